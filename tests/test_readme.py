"""What the documents say can be followed: links, YAML, commands and files are there."""

import re
from pathlib import Path

import pytest
import yaml

from phi_lit.__main__ import COMMANDS
from phi_lit.data.sources import open_source
from phi_lit.seam_table import LITGPT_COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "config_hub/README.md",
    "extensions/phi_moe/README.md",
]  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / name).parent / target).exists(), target
    assert not re.search(r"@@|TODO|TBD|\bXXX\b", text)
    for row in (line for line in text.splitlines() if line.startswith("|")):
        assert not re.search(r"\| ?[A-Z]+-[A-Z]+ ?\|", row), row  # a cell that waits for a figure


def test_sources_shown_in_the_readme_are_accepted() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        for source in yaml.safe_load(block)["data"]["init_args"]["sources"]:
            open_source(source)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_and_files_named_in_code_blocks_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for block in re.findall(r"```\n(.*?)```", text, re.S):
        for line in block.splitlines():
            words = line.split("#")[0].split()
            if words[:1] == ["phi-lit"]:
                assert " ".join(words[1:3]) in COMMANDS or words[1] in COMMANDS, line
            if words[:1] == ["litgpt"]:
                assert words[1] in LITGPT_COMMANDS, line
            for word in words:
                if word.startswith(("config_hub/", "benchmarks/")):
                    assert (ROOT / word).exists(), line
