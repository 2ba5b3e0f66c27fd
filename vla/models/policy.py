"""VLAPolicy: what the training scripts see of a model.

    N envs (or B samples)   C = chunk_size actions per decision   D = 7 action dimensions   L prompt ids

    act(obs, temperature, noise)                   tokens, logprobs [N, C, D], values [N, C]
    logprobs_and_values(obs, tokens, temperature)  logprobs, entropy [N, C, D], values [N, C]
    value(obs)                                     values [N, C]
    clone(obs, tokens, label_sigma)                losses, predicted tokens [N, C, D]
    decode(tokens)                                 actions [N, C, D] in robot units

The update calls the module itself, with the name of a mode: ZeRO-3 gathers weights in __call__ only.

`obs` is what an env returns, {"image": uint8 [N, H, W, 3] (torch or numpy), "task_description": N strings}, or what
preprocess() made of it. It may be on another device than the model. A GPU resizes the camera's images itself. For a
CPU, the workers of the envs can do it before (VLAPolicy.pixels).

Tokens are vocabulary ids, integers. Actions are floats. Log-probabilities are over the 256 action ids only and in fp32.
Rollout and update compute them with the same lines of code.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas import UserError
from schemas.pixels import Pixels, resize
from vla.models.action_tokens import ACTION_DIM, NUM_BINS, ActionTokens
from vla.models.tokenizer import PROMPT, check_no_action_ids, encode_prompt


class PolicyInputs(NamedTuple):
    """What the model reads: pixels at its own resolution, still uint8, and padded prompts."""

    images: Tensor  # uint8 [N, H, W, 3]
    prompt_ids: Tensor  # int64 [N, L]: BOS, padding, rest of the prompt
    prompt_mask: Tensor  # bool [N, L]
    features: Tensor | None = None  # [N, P, E] of frozen vision towers, in the model's precision

    def to(self, device: torch.device) -> "PolicyInputs":
        return PolicyInputs(*(None if field is None else moved(field, device) for field in self))


class PolicyOutput(NamedTuple):
    """What mode "evaluate" returns for given tokens."""

    logprobs: Tensor  # [B, C, D]
    entropy: Tensor  # [B, C, D], nats
    values: Tensor  # [B, C]
    fan_kl: Tensor | None = None  # [B, C, D], nats, where asked for


class VLAPolicy(nn.Module):
    """A vision-language-action model with its prompt, bins, statistics and critic.

    Args:
        model: OpenVLA or OpenVLAOFT.
        value_head: ValueHead with chunk_size outputs, or None for an actor alone.
        action_tokens: bins and statistics.
        tokenizer: of the `tokenizers` package, or None: then only prompt_ids() raises.
        image_size: (height, width) of the towers' input, pixels.
        pad_token_id: fills prompts up to max_prompt_length (published: 32000 and 30).
        chunk_size: actions per decision, 1 for OpenVLA.
        image_resize: "tensor" (RLinf's path) or "pil" (upstream's), see resize().
        caches_features: the vision towers are frozen, so the features of the rollout hold in the update. It is passed
            in, because in a rollout copy everything is frozen.
        cuda_graphs: on a GPU act() of OpenVLA launches recorded graphs. Without them it computes the same bits.
    """

    def __init__(
        self,
        model: nn.Module,
        value_head: nn.Module | None,
        action_tokens: ActionTokens,
        tokenizer,
        image_size: tuple[int, int],
        pad_token_id: int,
        max_prompt_length: int = 30,
        chunk_size: int = 1,
        image_resize: str = "tensor",
        caches_features: bool = False,
        cuda_graphs: bool = True,
    ):
        super().__init__()
        model.cuda_graphs = cuda_graphs
        self.caches_features = caches_features
        self.chunk_size = chunk_size
        self.image_resize = image_resize
        self.model = model
        self.value_head = value_head
        self.action_tokens = action_tokens
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.pad_token_id = pad_token_id
        self.max_prompt_length = max_prompt_length
        self.files = None  # saving.PolicyFiles: what saving needs beyond weights
        self._prompt_cache: dict[str, list[int]] = {}

    # ------------------------------------------------------------------ text and pixels
    def prompt_ids(self, task_description: str) -> list[int]:
        """The one place where text becomes ids: BOS, then the lower-cased instruction in OpenVLA's prompt.

        Raises:
            UserError: no tokenizer, a prompt that is too long, or one that the tokenizer changes.
        """
        if self.tokenizer is None:
            raise UserError("the checkpoint folder has no tokenizer.json: copy it into the folder of config.json")
        if task_description not in self._prompt_cache:
            prompt = PROMPT.format(task_description=task_description.lower())
            ids = encode_prompt(self.tokenizer, prompt, "tokenizer.json")
            check_no_action_ids(ids, self.action_tokens.first_id, task_description)
            if len(ids) > self.max_prompt_length:
                raise UserError(
                    f"the prompt for {task_description!r} has {len(ids)} tokens, --max_prompt_length is "
                    f"{self.max_prompt_length}: raise it or shorten the instruction"
                )
            self._prompt_cache[task_description] = ids
        return self._prompt_cache[task_description]

    def collate(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """N prompts with BOS -> ids int64 and mask bool, [N, L]: padding goes behind BOS.

        L is max_prompt_length, or the longest prompt where a caller's own ids are longer.
        """
        length = max(self.max_prompt_length, *map(len, prompts))
        ids = torch.full((len(prompts), length), self.pad_token_id)
        mask = torch.zeros(len(prompts), length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            start = length - (len(prompt) - 1)
            ids[row, 0], mask[row, 0] = prompt[0], True
            ids[row, start:] = torch.tensor(prompt[1:])
            mask[row, start:] = True
        return ids, mask

    def resized(self, images: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] (torch or numpy) -> uint8 [N, h, w, 3], the size of the model. A GPU resizes them itself.

        Raises:
            ValueError: images of another type or shape.
        """
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != 3:
            raise ValueError(f'obs["image"] must be uint8 [N, H, W, 3], it is {images.dtype} {tuple(images.shape)}')
        if self.image_resize == "tensor":
            images = moved(images, self.device)  # "pil" needs the CPU
        return resize(images, self.image_size, self.image_resize)

    def preprocess(self, obs: dict | PolicyInputs) -> PolicyInputs:
        """obs of an env -> PolicyInputs on the policy's device. Idempotent.

        Raises:
            ValueError: images that are not uint8 [N, H, W, 3], or not one instruction per image.
        """
        if isinstance(obs, PolicyInputs):
            return obs.to(self.device)
        images, texts = self.resized(obs["image"]), obs["task_description"]
        if isinstance(texts, str) or len(texts) != len(images):
            raise ValueError(f'obs["task_description"] must hold {len(images)} strings, one per image: {texts!r}')
        ids, mask = self.collate([self.prompt_ids(text) for text in texts])
        return PolicyInputs(images, ids, mask).to(self.device)

    @property
    def pixels(self) -> Pixels | None:
        """How workers of envs shall make this policy's images. None where its own GPU resizes the camera's images."""
        gpu_resizes = self.image_resize == "tensor" and self.device.type == "cuda"
        return None if gpu_resizes else Pixels(self.image_size, self.image_resize)

    def feature_shape(self) -> tuple[int, int]:
        """(P, E) of PolicyInputs.features for one image."""
        towers = (self.model.vision_backbone.featurizer, self.model.vision_backbone.fused_featurizer)
        return towers[0].num_patches, sum(tower.embed_dim for tower in towers)

    def prepare(self, obs: dict | PolicyInputs) -> PolicyInputs:
        """What the rollout acts on and keeps: also the features of frozen towers, so that nothing runs these again."""
        inputs = self.preprocess(obs)
        if not self.caches_features or inputs.features is not None:
            return inputs
        with torch.no_grad():
            return inputs._replace(features=self.model.vision_backbone(inputs.images))

    # ------------------------------------------------------------------ what you call
    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def act(
        self, obs: dict | PolicyInputs, temperature: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample a chunk of actions: tokens int64 and logprobs fp32 [N, C, D], and values fp32 [N, C].

        Args:
            temperature: 0 takes the likeliest tokens. Their log-probabilities are then those of temperature 1.
            noise: float64 [N, C, D], uniform in [0, 1), which decides the sample. None: from torch's generator.
        """
        inputs = self.preprocess(obs)
        if noise is None:
            noise = torch.rand(len(inputs.images), self.chunk_size, ACTION_DIM, dtype=torch.float64)
        return self("act", inputs, temperature=temperature, noise=noise.to(self.device))

    def logprobs_and_values(
        self, obs: dict | PolicyInputs, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities and entropy [N, C, D] of given tokens int64 [N, C, D], and values [N, C]."""
        inputs = self.preprocess(obs)
        return self("evaluate", inputs, tokens=tokens.to(self.device), temperature=temperature)[:3]

    def reference_logprobs(self, obs: dict | PolicyInputs, tokens: Tensor, temperature: float) -> Tensor:
        """Log-probabilities [N, C, D] of given tokens under the base model: the adapter is scaled by 0 meanwhile.

        Call it in the rollout, where weights are whole. It costs one more forward and no second copy of the weights.
        """
        adapters = [module for module in self.model.modules() if hasattr(module, "lora_A")]
        kept = [dict(module.scaling) for module in adapters]
        try:
            for module in adapters:
                module.scaling.update(dict.fromkeys(module.scaling, 0.0))
            return self.logprobs_and_values(obs, tokens, temperature)[0]
        finally:
            for module, scaling in zip(adapters, kept):
                module.scaling.update(scaling)

    def value(self, obs: dict | PolicyInputs) -> Tensor:
        """V(obs), fp32 [N, C]: one pass over the prompt, nothing is generated."""
        return self("value", self.preprocess(obs))

    def clone(
        self, obs: dict | PolicyInputs, tokens: Tensor, label_sigma: float = 0.0, context_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Behaviour cloning of given tokens: cross entropy fp32 and the likeliest tokens int64, [N, C, D] each.

        The cross entropy is over the whole vocabulary, as OpenVLA is trained. Code that samples from all of it then
        writes actions too.

        Args:
            tokens: int64 [N, C, D], the targets.
            label_sigma: bins over which a target is spread (ActionTokens.soft_targets).
            context_tokens: int64 [N, C, D], what the model reads as its own earlier tokens. None: the targets.
        """
        context = tokens if context_tokens is None else context_tokens
        return self(
            "clone",
            self.preprocess(obs),
            tokens=tokens.to(self.device),
            label_sigma=label_sigma,
            context_tokens=context.to(self.device),
        )

    def decode(self, tokens: Tensor) -> Tensor:
        """tokens int64 [N, C, D] -> actions float32 [N, C, D] in robot units, on the CPU."""
        return self.action_tokens.unnormalize(self.action_tokens.decode(tokens)).float()

    def free_graphs(self) -> None:
        """Give back the device memory of recorded graphs and their caches. The next act() records new ones."""
        self.model.graphs = None

    # ------------------------------------------------------------------ the four modes
    def forward(
        self, mode: Literal["act", "evaluate", "value", "clone"], inputs: PolicyInputs, *arguments, **named_arguments
    ):
        """The one entry: ZeRO-3 gathers weights in __call__. The other arguments are those of the method `_<mode>`.

        | mode     | what it does                         | it returns                                     |
        |----------|--------------------------------------|------------------------------------------------|
        | act      | samples tokens from noise            | tokens, logprobs [B, C, D], values [B, C]      |
        | evaluate | log-probabilities of given tokens    | PolicyOutput                                   |
        | value    | V of the observation                 | values [B, C]                                  |
        | clone    | cross entropy of given tokens        | losses, likeliest tokens [B, C, D]             |
        """
        modes = {"act": self._act, "evaluate": self._evaluate, "value": self._value, "clone": self._clone}
        return modes[mode](inputs, *arguments, **named_arguments)

    def _act(self, inputs: PolicyInputs, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """OpenVLA writes its tokens one by one, OpenVLA-OFT all at once. Log-probabilities are kept meanwhile."""
        flat_noise = noise.flatten(1)  # [B, C * D]
        tokens, logprobs = [], []

        def choose(logits: Tensor, start: int) -> Tensor:  # [B, K, V] -> [B, K]
            candidates = self._action_logprobs(logits, temperature)  # [B, K, 256]
            bins = sample_bins(candidates, flat_noise[:, start : start + logits.shape[1]], greedy=temperature == 0)
            logprobs.append(candidates.gather(-1, bins[..., None])[..., 0])
            tokens.append(bins + self.action_tokens.first_id)
            return tokens[-1]

        hidden = self.model.generate(*inputs, num_tokens=self.chunk_size * ACTION_DIM, choose=choose)
        return torch.cat(tokens, 1).view(noise.shape), torch.cat(logprobs, 1).view(noise.shape), self._values(hidden)

    def _evaluate(
        self, inputs: PolicyInputs, tokens: Tensor, temperature: float = 1.0, fan_sigma: float | None = None
    ) -> PolicyOutput:
        """fan_sigma: also compute fan_kl, with a Gaussian this wide."""
        logits, hidden = self.model(*inputs, tokens=tokens.flatten(1))  # [B, C * D, V], [B, H]
        logprobs = self._action_logprobs(logits, temperature).view(*tokens.shape, NUM_BINS)  # [B, C, D, 256]
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)  # [B, C, D], nats
        bins = (tokens - self.action_tokens.first_id)[..., None]  # [B, C, D, 1]
        fan = None if fan_sigma is None else fan_kl(logprobs, self.action_tokens.values.to(logprobs), fan_sigma)
        return PolicyOutput(logprobs.gather(-1, bins)[..., 0], entropy, self._values(hidden), fan)

    def _value(self, inputs: PolicyInputs) -> Tensor:
        return self._values(self.model(*inputs)[1])

    def _clone(
        self, inputs: PolicyInputs, tokens: Tensor, label_sigma: float, context_tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, _ = self.model(*inputs, tokens=context_tokens.flatten(1))  # [B, C * D, V]
        first, end = self.action_tokens.first_id, self.action_tokens.vocab_end
        logprobs = F.log_softmax(logits.view(*tokens.shape, -1).float(), dim=-1)[..., first:end]  # [B, C, D, 256]
        targets = self.action_tokens.soft_targets(tokens, label_sigma)
        return -(targets * logprobs).sum(dim=-1), logprobs.argmax(dim=-1) + first

    # ------------------------------------------------------------------ inside
    def _action_logprobs(self, logits: Tensor, temperature: float) -> Tensor:
        """logits [..., V] -> log-probabilities over the 256 action ids, fp32 [..., 256]."""
        action_logits = logits[..., self.action_tokens.first_id : self.action_tokens.vocab_end].float()
        return F.log_softmax(action_logits / (temperature or 1.0), dim=-1)

    def _values(self, hidden: Tensor) -> Tensor:
        """hidden [B, H] -> values fp32 [B, C], zeros for an actor without critic."""
        if self.value_head is None:
            return hidden.new_zeros(len(hidden), self.chunk_size, dtype=torch.float32)
        return self.value_head(hidden).float()


def uniform_noise(num_envs: int, chunk_size: int, generator: torch.Generator) -> Tensor:
    """float64 [num_envs, chunk_size, 7] in [0, 1): what act() turns into a sample."""
    return torch.rand(num_envs, chunk_size, ACTION_DIM, dtype=torch.float64, generator=generator)


def rollout_noise(
    num_decisions: int, num_envs: int, rows: slice, chunk_size: int, generator: torch.Generator
) -> Tensor:
    """Noise for `rows` of num_envs envs, float64 [num_decisions, n, chunk_size, 7], the same on any number of ranks."""
    return torch.stack([uniform_noise(num_envs, chunk_size, generator)[rows] for _ in range(num_decisions)])


def sample_bins(logprobs: Tensor, noise: Tensor, greedy: bool) -> Tensor:
    """logprobs [..., 256], noise [...] in [0, 1) -> bins int64 [...], by inverting the cumulative distribution."""
    if greedy:
        return logprobs.argmax(dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    bins = torch.searchsorted(cumulative, (noise * cumulative[..., -1])[..., None], right=True)[..., 0]
    return bins.clamp(max=NUM_BINS - 1)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A GPU fetches it from page-locked memory by itself, so nothing waits for the transfer.

    torch reuses that memory only after the transfer. The other direction waits: a CPU could read too early.
    """
    if device.type == "cuda" and tensor.is_cpu:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fan_kl(logprobs: Tensor, centers: Tensor, sigma: float) -> Tensor:
    """KL(policy, G) per token: G is the Gaussian around the policy's own mode, over the same bins.

    FAN (arXiv 2604.01570): near the best action lie others that do as well, so a policy over bins should fall off
    smoothly around its mode. The mode is a constant here: G follows the policy, it is not pulled.

    Args:
        logprobs: [..., 256]. centers: [256], what the ids mean, in [-1, 1]. sigma: in the same unit.

    Returns:
        [...], nats.
    """
    modes = centers[logprobs.argmax(dim=-1)][..., None]
    target = F.log_softmax(-((centers - modes) ** 2) / (2 * sigma**2), dim=-1)
    return (logprobs.exp() * (logprobs - target)).sum(dim=-1)
