"""Model and adapter folders: what is in them is honoured as transformers and peft do, or refused in one sentence."""

import pytest
import torch

from vla.tensors import digest, entry, first_not_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(dtype, value):
    good = {"a": torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype), "ids": torch.arange(3), "none": torch.ones(0)}
    assert first_not_finite(good) is None
    bad = torch.zeros(2, 70, dtype=dtype)
    bad[1, 69] = value
    assert first_not_finite({**good, "b": bad, "c": bad}) == "b"
    assert first_not_finite(iter([("x", bad)])) == "x"


def test_a_digest_knows_every_byte_shape_and_name():
    def of(**tensors) -> str:
        return digest({name: entry(tensor) for name, tensor in tensors.items()})

    a, b = torch.arange(6.0), torch.ones(2, dtype=torch.bfloat16)
    assert of(a=a, b=b) == of(b=b, a=a.clone())
    changed = a.clone()
    changed[3] = torch.nextafter(changed[3], torch.tensor(9.0))
    others = [of(a=changed, b=b), of(a=a.flip(0), b=b), of(a=a.view(2, 3), b=b), of(a=a.double(), b=b), of(c=a, b=b)]
    assert len({of(a=a, b=b), *others}) == 6
