"""The prompt, and the tokenizer that turns it into ids: a checkpoint's, or the tiny presets' own.

A prompt is BOS and then the ids of its text, none more and none less. transformers applies the rules of tokenizer.json
and of tokenizer_config.json; those that would add to a prompt or swallow a part of it are refused, since the model was
never shown such prompts.
"""

import contextlib
import json
from collections.abc import Iterator

from tokenizers import Tokenizer, processors

from schemas import UserError, check, parse_json
from schemas.policies import TokenizerConfig

PROMPT = "In: What action should the robot take to {task_description}?\nOut: "
BOS_ID = 1
BOS = "<s>"
AGAIN = "use the tokenizer files that the model was published with"


def begin_with_bos(bos: str = BOS) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS_ID)])


@contextlib.contextmanager
def spoken(source: str) -> Iterator[None]:
    """What the tokenizers package raises, its Rust panics included (a BaseException), as one sentence."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        said = " ".join(str(error).split())[:120]
        raise UserError(f"{source} is damaged or of another kind ({said}): {AGAIN}") from None


def read_tokenizer(side_files: dict[str, bytes], path: str = "the checkpoint") -> Tokenizer | None:
    """tokenizer.json, made to begin a text with BOS (in some published files that is left to Python code), or None.

    Raises:
        UserError: it is none, or its rules give other ids than BOS and those of the text.
    """
    if "tokenizer.json" not in side_files:
        return None
    source = f"{path}/tokenizer.json"
    with spoken(source):
        tokenizer = Tokenizer.from_str(side_files["tokenizer.json"].decode())
        tokenizer.no_truncation()  # some files keep what they were last used with; transformers ignores it as well
        tokenizer.no_padding()
        plain, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    bos = check_added_tokens(tokenizer, side_files, path)
    if getattr(tokenizer.model, "dropout", None):
        raise UserError(f"{source} has model.dropout, so a prompt's ids are drawn at random: set it to null")
    if whole == plain:
        tokenizer.post_processor = begin_with_bos(bos)
    elif whole != [BOS_ID, *plain]:
        raise UserError(
            f"{source} has a post_processor that makes {whole} of a text with ids {plain}, a prompt begins with "
            f"{BOS_ID} and adds nothing else: {AGAIN}"
        )
    encode_prompt(tokenizer, PROMPT.format(task_description="put carrot on plate"), source)
    return tokenizer


def check_added_tokens(tokenizer: Tokenizer, side_files: dict[str, bytes], path: str) -> str:
    """What tokenizer_config.json and added_tokens.json say must be so in tokenizer.json: transformers reads all three.

    Returns:
        the name of BOS.
    """
    source = f"{path}/tokenizer_config.json"
    content = parse_json(side_files.get("tokenizer_config.json", b"{}"), source, AGAIN)
    config = check(TokenizerConfig, content, source, AGAIN)
    bos = config.bos_token or BOS
    wanted = [(bos, BOS_ID, source)]
    wanted += [(token.content, int(number), source) for number, token in config.added_tokens_decoder.items()]
    source = f"{path}/added_tokens.json"
    added = check(dict[str, int], parse_json(side_files.get("added_tokens.json", b"{}"), source, AGAIN), source, AGAIN)
    wanted += [(content, number, source) for content, number in added.items()]
    for content, number, source in wanted:
        found = tokenizer.token_to_id(content)
        if found != number:
            raise UserError(
                f"{source} gives {content!r} the id {number}, {path}/tokenizer.json gives it {found}: {AGAIN}"
            )
    return bos


def encode_prompt(tokenizer: Tokenizer, prompt: str, source: str) -> list[int]:
    """Text -> BOS and its ids, of which the text can be read again.

    Raises:
        UserError: the tokenizer's own rules drop or change a part of the text.
    """
    with spoken(source):
        ids = tokenizer.encode(prompt).ids
        again = prompt if tokenizer.decoder is None else tokenizer.decode(ids[1:], skip_special_tokens=False)
    if ids[:1] != [BOS_ID] or again != prompt:
        raise UserError(
            f"{source} makes {json.dumps(again)} of the prompt {json.dumps(prompt)}, so its rules change or drop a "
            f"part of it: {AGAIN}"
        )
    return ids


def check_no_action_ids(ids: list[int], first_action_id: int, text: str) -> None:
    """Raise UserError where a text has ids that mean actions, or padding: the model would read it as such."""
    if max(ids) >= first_action_id:
        raise UserError(
            f"the instruction {text!r} has the id {max(ids)}, and ids from {first_action_id} on are actions: use other "
            "words, or the tokenizer that the model was published with"
        )
