"""The prompt, and the tokenizer that turns it into ids.

A prompt is BOS followed by exactly the ids of its text. transformers applies the rules of tokenizer.json and
tokenizer_config.json. Rules that would add to a prompt or drop a part of it are refused, because the model was not
trained on such prompts.
"""

import contextlib
import json
from collections.abc import Iterator

from tokenizers import Tokenizer, processors

from schemas import UserError, check, parse_json
from schemas.policies import TokenizerConfig
from vla.text import error_text

PROMPT = "In: What action should the robot take to {task_description}?\nOut: "
BOS_ID = 1
BOS = "<s>"
PUBLISHED_FILES = "use the tokenizer files that the model was published with"


def begin_with_bos(bos: str = BOS) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS_ID)])


@contextlib.contextmanager
def tokenizer_errors(source: str) -> Iterator[None]:
    """Turn errors of the tokenizers package into UserErrors, also its Rust panics (a BaseException)."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        reason = error_text(error)[:120]
        raise UserError(f"{source} is damaged or of another kind ({reason}): {PUBLISHED_FILES}") from None


def read_tokenizer(side_files: dict[str, bytes], path: str = "the checkpoint") -> Tokenizer | None:
    """The tokenizer of tokenizer.json, or None without that file. It begins every text with BOS.

    In some published files only transformers' Python code adds BOS. Such a tokenizer gets a rule for it here.

    Raises:
        UserError: the file is damaged, or its rules give other ids than BOS and those of the text.
    """
    if "tokenizer.json" not in side_files:
        return None
    source = f"{path}/tokenizer.json"
    with tokenizer_errors(source):
        tokenizer = Tokenizer.from_str(side_files["tokenizer.json"].decode())
        tokenizer.no_truncation()  # some files keep the setting of their last use. transformers ignores it, too
        tokenizer.no_padding()
        plain, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    bos = check_added_tokens(tokenizer, side_files, path)
    if getattr(tokenizer.model, "dropout", None):
        raise UserError(f"{source} has model.dropout, so a prompt's ids are drawn at random: set it to null")
    if whole == plain:
        tokenizer.post_processor = begin_with_bos(bos)
    elif whole != [BOS_ID, *plain]:
        raise UserError(
            f"{source} has a post_processor that makes {whole} of a text with ids {plain}, but a prompt must begin "
            f"with {BOS_ID} and add nothing else: {PUBLISHED_FILES}"
        )
    encode_prompt(tokenizer, PROMPT.format(task_description="put carrot on plate"), source)
    return tokenizer


def check_added_tokens(tokenizer: Tokenizer, side_files: dict[str, bytes], path: str) -> str:
    """Check that tokenizer_config.json and added_tokens.json agree with tokenizer.json. transformers reads all three.

    Returns:
        the text of BOS.

    Raises:
        UserError: they give a token another id than tokenizer.json.
    """
    source = f"{path}/tokenizer_config.json"
    content = parse_json(side_files.get("tokenizer_config.json", b"{}"), source, PUBLISHED_FILES)
    config = check(TokenizerConfig, content, source, PUBLISHED_FILES)
    bos = config.bos_token or BOS
    wanted = [(bos, BOS_ID, source)]
    wanted += [(token.content, int(number), source) for number, token in config.added_tokens_decoder.items()]
    source = f"{path}/added_tokens.json"
    content = parse_json(side_files.get("added_tokens.json", b"{}"), source, PUBLISHED_FILES)
    added = check(dict[str, int], content, source, PUBLISHED_FILES)
    wanted += [(text, number, source) for text, number in added.items()]
    for text, number, source in wanted:
        found = tokenizer.token_to_id(text)
        if found != number:
            raise UserError(
                f"{source} gives {text!r} the id {number}, {path}/tokenizer.json gives it {found}: {PUBLISHED_FILES}"
            )
    return bos


def encode_prompt(tokenizer: Tokenizer, prompt: str, source: str) -> list[int]:
    """BOS and the ids of a prompt. Decoding them gives the prompt again.

    Raises:
        UserError: the tokenizer's rules drop or change a part of the text.
    """
    with tokenizer_errors(source):
        ids = tokenizer.encode(prompt).ids
        decoded = prompt if tokenizer.decoder is None else tokenizer.decode(ids[1:], skip_special_tokens=False)
    if ids[:1] != [BOS_ID] or decoded != prompt:
        raise UserError(
            f"{source} makes {json.dumps(decoded)} of the prompt {json.dumps(prompt)}, so its rules change or drop a "
            f"part of it: {PUBLISHED_FILES}"
        )
    return ids


def check_no_action_ids(ids: list[int], first_action_id: int, text: str) -> None:
    """Raise UserError if a text has ids of actions or padding, because the model would read them as such."""
    if max(ids) >= first_action_id:
        raise UserError(
            f"the instruction {text!r} has the id {max(ids)}, and ids from {first_action_id} on are actions: use other "
            "words, or the tokenizer that the model was published with"
        )
