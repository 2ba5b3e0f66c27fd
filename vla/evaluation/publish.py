"""A finished policy goes to the Hugging Face Hub, with its card: --push_to_hub."""

import os
import re
from pathlib import Path

from schemas import UserError, parse_json
from schemas.hub import one_line
from vla import VERSION
from vla.distributed import leave_group, rank
from vla.evaluation.model_card import card

REPO = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
TAGS = ["vision-language-action", "robotics", "reinforcement-learning", "maniskill", "solovla"]


def check_push(repo: str | None) -> None:
    """Raise UserError for a --push_to_hub that would fail at the end of the run. Nothing is sent."""
    if repo is None:
        return
    from huggingface_hub import get_token, is_offline_mode

    if not REPO.fullmatch(repo):
        raise UserError(f"--push_to_hub {repo} must be the name of a model, such as your-name/my-policy")
    if is_offline_mode():
        raise UserError("--push_to_hub needs the network, but HF_HUB_OFFLINE is set: unset it, or leave the flag out")
    if get_token() is None:
        raise UserError("--push_to_hub needs a token that may write: run `hf auth login`, or set HF_TOKEN")


def push_policy(repo: str | None, run_dir: Path, folder: Path | None = None) -> None:
    """Upload a policy's folder from rank 0, as the last thing of a run. All ranks call it, and leave their group.

    A repository that does not exist is made, and is private. Its owner decides who may see it.

    Args:
        repo: None uploads nothing.
        run_dir: the run, which the card describes.
        folder: of the policy. None takes that of the newest checkpoint.

    Raises:
        UserError: the upload failed. The sentence names the command that repeats it. The run is complete.
    """
    if repo is None:
        return
    number = rank()
    leave_group()  # the others need not wait for the upload
    if number != 0:
        return
    folder = folder or max(run_dir.glob("checkpoints/iteration_*[0-9]/policy"))
    try:
        (folder / "README.md").write_text(front_matter(folder) + card(run_dir, folder, repo), encoding="utf-8")
        url = upload(repo, folder, f"{run_dir.resolve().name} (SoloVLA {VERSION})")
    except Exception as error:  # the library raises errors of a dozen kinds
        raise UserError(
            f"--push_to_hub {repo} failed ({one_line(error)}), and the run is complete: repeat it with "
            f"`hf upload {repo} {folder} .`"
        ) from error
    print(f"pushed      {folder} to {url}", flush=True)


def upload(repo: str, folder: Path, message: str) -> str:
    """All files of a folder in one commit. Returns the model's page."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="solovla", library_version=VERSION)
    page = api.create_repo(repo, private=True, exist_ok=True)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    print(f"push        {len(files)} files to {page}", flush=True)
    api.create_commit(
        repo,
        [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=os.fspath(path)) for path in files],
        commit_message=message,
    )
    return str(page)


def front_matter(folder: Path) -> str:
    """The metadata that the Hub reads at the top of a card. It names the base of an adapter that is on the Hub."""
    from huggingface_hub import ModelCardData

    adapter = folder / "adapter_config.json"
    content = parse_json(adapter.read_bytes(), str(adapter), "") if adapter.exists() else {}
    base = content.get("base_model_name_or_path")
    on_hub = base if base and REPO.fullmatch(base) else None
    data = ModelCardData(library_name="solovla", pipeline_tag="robotics", tags=TAGS, base_model=on_hub)
    return f"---\n{data.to_yaml()}\n---\n\n"
