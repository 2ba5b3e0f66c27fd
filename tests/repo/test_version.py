"""One version: of the code, of CHANGELOG.md and CITATION.cff, in run folders, checkpoints and cards."""

import datetime
import json
import re

import yaml
from conftest import ROOT

import doctor
from schemas import read_json
from schemas.runs import Description, State
from vla import VERSION
from vla.logger import describe_run
from vla.training.checkpoint import FORMAT, OLD_FORMAT, put_in_place, read_state

HEADING = re.compile(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", re.M)


def test_the_newest_heading_of_the_changelog_is_the_version():
    headings = HEADING.findall((ROOT / "CHANGELOG.md").read_text())
    assert headings[0][0] == VERSION
    numbers = [tuple(map(int, version.split("."))) for version, _ in headings]
    dates = [datetime.date.fromisoformat(date) for _, date in headings]
    assert len(headings) >= 3 and numbers == sorted(numbers, reverse=True) and dates == sorted(dates, reverse=True)


def test_the_changelog_says_which_checkpoints_resume():
    newest = HEADING.split((ROOT / "CHANGELOG.md").read_text())[3]
    assert f"### Checkpoints: format {FORMAT}\n" in newest
    assert f"Checkpoints of format {OLD_FORMAT} still resume" in newest


def test_the_citation_is_valid_and_has_the_version():
    """CFF 1.2.0 requires the first four keys, and allows no others than those of its schema."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    required = {"cff-version", "message", "title", "authors"}
    assert (
        required
        <= citation.keys()
        <= required
        | {*("type", "abstract", "version", "date-released", "license", "keywords", "repository-code", "url")}
    )
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": "SoloVLA contributors"}]
    assert (citation["version"], citation["date-released"]) == HEADING.findall((ROOT / "CHANGELOG.md").read_text())[0]
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_doctor_prints_the_version():
    assert doctor.check_version() == doctor.ok(f"SoloVLA {VERSION}") and next(iter(doctor.CHECKS)) == "version"


def test_a_run_carries_the_version_and_older_ones_are_read(tmp_path):
    path = tmp_path / "run_from_iteration_000000.json"
    description = describe_run({"seed": 0}, {}, num_ranks=1)
    path.write_text(json.dumps(description))
    assert read_json(path, Description, "").version == VERSION
    description.pop("version")
    path.write_text(json.dumps(description))
    assert read_json(path, Description, "").version is None


def test_a_checkpoint_carries_the_version_and_older_ones_are_read(tmp_path):
    partial, final = tmp_path / "iteration_000004.partial", tmp_path / "iteration_000004"
    partial.mkdir()
    (partial / "weights").write_bytes(b"12345")
    put_in_place(partial, final, {"iteration": 4, "global_step": 1, "trained": {}}, {})
    state = read_state(final)
    assert isinstance(state, State) and state.version == VERSION
    older = json.loads((final / "state.json").read_text())
    older.pop("version")
    (final / "state.json").write_text(json.dumps(older))
    assert read_state(final).version is None
