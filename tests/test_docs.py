"""Every code block of README.md and docs/ is run, or parsed and counted with a reason (tests/blocks.py)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import PAGES, ROOT, Block, BlockError, read_blocks, setups, summary
from warm import Warm

import ooc_influence

TEXT = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
BLOCKS = {name: read_blocks(name, text) for name, text in TEXT.items()}
ALL = [block for blocks in BLOCKS.values() for block in blocks]
PRINTED = {"README.md": r"proponents \[[ \d]+\] opponents \[[ \d]+\]"}  # beside the exit code
DOCUMENTS = """
import json, sys
sys.path.insert(0, {tests!r})
from test_hf import documents, make_model
make_model("my-model")
with open("corpus.jsonl", "w") as corpus, open("questions.jsonl", "w") as questions:
    for number, document in enumerate(documents(40)):
        words = document["text"].split()
        line = {{"name": f"doc{{number}}", "text": document["text"], "source": document["source"]}}
        print(json.dumps(line), file=corpus)
        if number < 3:
            line = {{"question": "w1 " + " ".join(words[:5]), "answer": "w2 " + " ".join(words[5:9])}}
            print(json.dumps(line), file=questions)
"""


def pages_with(*kinds: str) -> list[str]:
    return [name for name, blocks in BLOCKS.items() if any(block.kind in kinds for block in blocks)]


@pytest.fixture(scope="module")
def warm():
    for name in ("sklearn", "transformers", "datasets", "jinja2", "matplotlib"):
        pytest.importorskip(name)
    server = Warm()
    yield server
    server.close()


@pytest.fixture(scope="module")
def kit(warm, tmp_path_factory):
    """What pages may begin with, made once, by name."""
    folder = tmp_path_factory.mktemp("kit")
    (folder / "my.py").write_text(
        "from ooc_influence.cli.demo.digits import recipe  # the demo's: your own goes here\n"
    )
    (folder / "documents.py").write_text(DOCUMENTS.format(tests=str(ROOT / "tests")))
    extract = "ooc-influence extract --recipe my.py:recipe --split"
    check(warm.run(["bash", "-ec", f"""
        {extract} train --store train.zarr --k 1024
        {extract} test --store test.zarr --like train.zarr
        ooc-influence fisher train.zarr
        python documents.py
        ooc-influence extract --model my-model --data corpus.jsonl --store corpus.zarr --id name --keep source
        ooc-influence extract --model my-model --data questions.jsonl --store questions.zarr --like corpus.zarr \\
            --prompt question --completion answer
        ooc-influence fisher corpus.zarr
    """], folder))  # fmt: skip
    recipe = ["my.py", "demo-output"]
    stores = [*recipe, "train.zarr", "test.zarr"]
    documents = ["my-model", "corpus.jsonl", "questions.jsonl"]
    corpus = [*documents, "corpus.zarr", "questions.zarr"]
    return folder, {"recipe": recipe, "stores": stores, "documents": documents, "corpus": corpus}


def check(done: subprocess.CompletedProcess[str], where: str = "set-up") -> str:
    assert done.returncode == 0, f"{where}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def run_page(name: str, kinds: set[str], warm: Warm, kit, tmp_path: Path, **variables: str) -> str:
    source, holds = kit
    for setup in setups(TEXT[name]):
        for item in holds[setup]:
            copy = shutil.copytree if (source / item).is_dir() else shutil.copy
            copy(source / item, tmp_path / item)
    printed = []
    for block in BLOCKS[name]:
        if block.kind not in kinds:
            continue
        script = tmp_path / f"block-{block.line}.{'sh' if block.language == 'bash' else 'py'}"
        script.write_text(block.text)
        command = ["bash", "-e", script.name] if block.language == "bash" else ["python", script.name]
        command[0] = str(warm.folder / "python") if command[0] == "python" else command[0]
        printed.append(check(warm.run(command, tmp_path, **variables), f"{name}:{block.line}"))
    return "".join(printed)


@pytest.mark.parametrize("name", [name for name in pages_with("run") if "s3" not in setups(TEXT[name])])
def test_the_blocks_of_a_page_run(name, warm, kit, tmp_path):
    printed = run_page(name, {"run"}, warm, kit, tmp_path)
    assert re.search(PRINTED.get(name, ""), printed)


@pytest.mark.parametrize("block", [b for b in ALL if b.kind != "output"], ids=lambda b: f"{b.page}:{b.line}")
def test_blocks_are_what_they_say(block):
    if block.language == "python":
        compile(block.text, f"{block.page}:{block.line}", "exec")
    else:
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


def test_blocks_are_counted():
    assert summary(ALL) in (ROOT / "CONTRIBUTING.md").read_text()


def test_marks_can_be_missing():
    assert read_blocks("page", "<!-- run -->\n```bash\ntrue\n```\n") == [Block("page", 2, "bash", "true\n", "run")]
    for text in ("```bash\ntrue\n```\n", "<!-- output -->\n```bash\ntrue\n```\n", "<!-- syntax: -->\n```bash\n```\n",
                 " ```bash\n ```\n", "<!-- run -->\n```\n```\n"):  # fmt: skip
        with pytest.raises(BlockError, match="page:"):
            read_blocks("page", text)


def test_a_failing_block_fails(warm, tmp_path):
    for text in ("ooc-influence info nothing.zarr\ntrue\n", "import nothing\n"):
        (tmp_path / "script").write_text(text)
        command = ["bash", "-e"] if text.startswith("ooc") else [str(warm.folder / "python")]
        with pytest.raises(AssertionError, match=r"exit code [12]"):
            check(warm.run([*command, "script"], tmp_path))


def test_the_installed_command_runs(tmp_path):
    command = Path(sys.executable).parent / "ooc-influence"
    done = subprocess.run([command, "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert ooc_influence.__version__ in done.stdout


@pytest.mark.parametrize("name", TEXT)
def test_links_lead_somewhere(name):
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", TEXT[name]) if "://" not in link]
    assert name != "README.md" or links
    assert all((ROOT / name).parent.joinpath(link).exists() for link in links)


def test_the_scripts_they_name_are_there():
    scripts = re.findall(r"`python (tools/\S+\.py)", "".join(TEXT.values()))
    assert scripts
    assert all((ROOT / script).exists() for script in scripts)


def test_every_public_name_is_on_the_api_page():
    named = set(re.findall(r"^::: ooc_influence\.(\w+)$", TEXT["docs/api.md"], re.M))
    assert named == set(ooc_influence.__all__) - {"__version__"}


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^\s+- .+: (\S+\.md)$", text, re.M)
    assert sorted(listed) == sorted(name.removeprefix("docs/") for name in TEXT if name.startswith("docs/"))
