"""Every code block of README.md and docs/ is run, or parsed and counted with a reason (tests/blocks.py)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from importlib import import_module
from inspect import isfunction
from pathlib import Path

import pytest
from blocks import PAGES, ROOT, Block, BlockError, read_blocks, setups, summary
from warm import Warm

import ooc_influence
from ooc_influence import evaluate
from ooc_influence.report import plot

TEXT = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
LONG = {f"docs/{name}.md" for name in ("howto/collect", "howto/finetuned", "howto/which", "extraction")}
BLOCKS = {name: read_blocks(name, text) for name, text in TEXT.items()}
ALL = [block for blocks in BLOCKS.values() for block in blocks]
FLOAT = re.compile(r"-?\d+\.\d*")
START, TRACE = "docs/index.md", "docs/howto/trace.md"  # what other pages start from, made by their blocks
DOCUMENTS = ["my-model", "corpus.jsonl", "questions.jsonl"]
HOLDS = {
    "start": (START, ["my.py", "train.zarr", "test.zarr", "train-images.npy", "test-images.npy"]),
    "documents": (TRACE, DOCUMENTS),
    "corpus": (TRACE, [*DOCUMENTS, "answer", "corpus.zarr", "answers.zarr"]),
    "s3": (None, []),
}


def pages_with(*kinds: str) -> list[str]:
    return [name for name, blocks in BLOCKS.items() if any(block.kind in kinds for block in blocks)]


@pytest.fixture(scope="module")
def warm():
    for name in ("sklearn", "transformers", "datasets", "jinja2", "matplotlib", "faiss"):
        pytest.importorskip(name)
    server = Warm()
    yield server
    server.close()


@pytest.fixture(scope="module")
def kit(warm, tmp_path_factory):
    """The folders that the pages others start from leave, and what they printed, by page."""
    made = {}
    for name in (START, TRACE):
        folder = tmp_path_factory.mktemp("kit")
        made[name] = folder, run_blocks(name, {"run"}, warm, folder)
    return made


def check(done: subprocess.CompletedProcess[str], where: str = "set-up") -> str:
    assert done.returncode == 0, f"{where}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def starts_from(text: str) -> str:
    """The line of a page that tells its reader what it starts from."""
    return next(line for line in text.splitlines() if "Starts from" in line and not line.startswith("<!--"))


def run_page(name: str, kinds: set[str], warm: Warm, kit, tmp_path: Path, **variables: str) -> str:
    said = starts_from(TEXT[name]) if setups(TEXT[name]) else ""
    for page, items in (HOLDS[setup] for setup in setups(TEXT[name])):
        for item in (item for item in items if f"`{item}`" in said):  # what a reader is not told of is not there
            source = kit[page][0] / item
            (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / item)
    return run_blocks(name, kinds, warm, tmp_path, **variables)


def run_blocks(name: str, kinds: set[str], warm: Warm, folder: Path, **variables: str) -> str:
    printed = []
    for block in BLOCKS[name]:
        if block.kind not in kinds:
            continue
        script = folder / f"block-{block.line}.{'sh' if block.language == 'bash' else 'py'}"
        script.write_text(block.text)
        command = ["bash", "-e", script.name] if block.language == "bash" else ["python", script.name]
        if block.language == "python":  # a slow one may spawn processes, which a forked one cannot
            command[0] = sys.executable if block.kind == "run slow" else str(warm.folder / "python")
        printed.append(check(warm.run(command, folder, **variables), f"{name}:{block.line}"))
    return "".join(printed)


def quick_or_slow(name):
    """Pages whose blocks train for long are slow."""
    return pytest.param(name, marks=pytest.mark.slow) if name in LONG else name


@pytest.mark.parametrize("name", [quick_or_slow(name) for name in pages_with("run") if "s3" not in setups(TEXT[name])])
def test_the_blocks_of_a_page_run(name, warm, kit, tmp_path):
    printed = kit[name][1] if name in kit else run_page(name, {"run"}, warm, kit, tmp_path)
    for block in BLOCKS[name]:
        if block.kind == "prints":
            assert prints(printed, block.text), f"{name}:{block.line}"


def prints(printed: str, expected: str) -> bool:
    """Whether lines occur one after the other; floats may differ by 5 %, columns in their width."""
    lines, wanted = printed.splitlines(), expected.splitlines()
    return any(
        all(map(same_line, lines[start : start + len(wanted)], wanted)) for start in range(len(lines) - len(wanted) + 1)
    )


def same_line(line: str, wanted: str) -> bool:
    numbers, expected = ([float(number) for number in FLOAT.findall(text)] for text in (line, wanted))
    same_words = FLOAT.sub("#", line).split() == FLOAT.sub("#", wanted).split()
    return same_words and numbers == pytest.approx(expected, rel=0.05)


def test_what_is_printed_is_compared():
    printed = "rows\nfound [1 2]  -1.50\nend\n"
    assert prints(printed, "found [1 2] -1.52\nend\n")
    for wrong in ("found [1 3] -1.50\n", "found [1 2] -1.70\n", "rows\nend\n", "end\nmore\n"):
        assert not prints(printed, wrong)


@pytest.fixture
def endpoint():
    """An S3 service of this process with a bucket, as environment variables."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    secrets = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")
    variables = {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", **secrets}
    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
    yield variables
    server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", pages_with("run slow"))
def test_the_slow_blocks_of_a_page_run(name, warm, kit, tmp_path, endpoint):
    run_page(name, {"run", "run slow"}, warm, kit, tmp_path, **endpoint)


def test_blocks_are_what_they_say():
    assert ALL
    for block in (b for b in ALL if b.kind not in ("output", "prints")):
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


def test_a_page_says_what_it_starts_from():
    for name in [name for name in TEXT if setups(TEXT[name])]:
        pages = [Path(HOLDS[setup][0]).name for setup in setups(TEXT[name]) if HOLDS[setup][0] is not None]
        assert pages
        assert all(f"{page})" in starts_from(TEXT[name]) for page in pages)


def test_links_lead_somewhere():
    for name in TEXT:
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", TEXT[name]) if "://" not in link]
        assert name != "README.md" or links
        assert all((ROOT / name).parent.joinpath(link).exists() for link in links)


def test_nobody_is_sent_to_an_index_that_does_not_have_the_package():
    sources = [path.read_text("utf-8") for path in (ROOT / "ooc_influence").rglob("*.py")]
    wanted = [name for text in [*TEXT.values(), *sources] for name in re.findall(r"pip install '?([\w.]+)\[?", text)]
    assert wanted
    assert not any(name.replace("-", "_").startswith("ooc_influence") for name in wanted)
    extras = {
        extra for text in TEXT.values() for found in re.findall(r"'\.\[(.+?)\]'", text) for extra in found.split(",")
    }
    assert extras <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.mark.slow
def test_the_picture_is_what_its_script_draws(tmp_path):
    pytest.importorskip("sklearn")
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "answer.png"
    command = [sys.executable, ROOT / "tools" / "picture.py", "--out", path, "--folder", tmp_path / "demo"]
    subprocess.run(command, check=True)
    drawn, committed = image.imread(path), image.imread(ROOT / "docs" / "img" / "answer.png")
    assert drawn.shape == committed.shape
    assert abs(drawn - committed).mean() < 0.01  # scores may differ in a digit


def test_the_scripts_they_name_are_there():
    scripts = re.findall(r"`python (tools/\S+\.py)", "".join(TEXT.values()))
    assert scripts
    assert all((ROOT / script).exists() for script in scripts)


def test_every_public_name_is_on_the_api_page():
    named = set(re.findall(r"^::: ooc_influence\.(\w+)$", TEXT["docs/api.md"], re.M))
    assert named == set(ooc_influence.__all__) - {"__version__"}


def test_every_public_name_is_in_the_glossary():
    words = set(re.findall(r"\w+", TEXT["docs/glossary.md"]))
    assert set(ooc_influence.__all__) - {"__version__"} <= words


def test_rooms_of_their_own_are_on_it_too():
    listed = re.findall(r"^::: (ooc_influence\.[\w.]+)\.(\w+)$", TEXT["docs/api.md"], re.M)
    assert all(hasattr(import_module(room), name) for room, name in listed)
    plots = [name for name, value in vars(plot).items() if isfunction(value) and value.__module__ == plot.__name__]
    wanted = {("ooc_influence.evaluate", name) for name in evaluate.__all__}
    wanted |= {(plot.__name__, name) for name in plots if not name.startswith("_")}
    wanted |= {("ooc_influence.report", name) for name in ("write_report", "Corpus")}
    wanted |= {("ooc_influence.hf", name) for name in ("extract", "extract_shards", "load", "Loaded")}
    assert wanted <= set(listed)


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^\s+- .+: (\S+\.md)$", text, re.M)
    assert sorted(listed) == sorted(name.removeprefix("docs/") for name in TEXT if name.startswith("docs/"))
