"""A live report: queries get the library's answer, only the token's holder may ask, Ctrl-C leaves nothing behind."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from models import Mlp, batches, data, loss, make
from test_cli import run  # noqa: F401 - a fixture

import ooc_influence as ooc
from ooc_influence.curvature import Curvature, eigen
from ooc_influence.errors import InputError, OocInfluenceWarning
from ooc_influence.progress import Progress, watched
from ooc_influence.report import Corpus
from ooc_influence.report.live_query import Jobs, RecipeModel
from ooc_influence.report.server import LARGEST, PageServer, live_report

pytest.importorskip("jinja2")
pytestmark = pytest.mark.filterwarnings("ignore::ooc_influence.OocInfluenceWarning")

RECIPE = """
import torch
from models import Mlp, batches, data, loss, make
from ooc_influence import Recipe

def read(text):
    values = [float(part) for part in text.split()]
    return torch.tensor([values[:-1]]), torch.tensor([int(values[-1])])

def recipe():
    x, y = data(Mlp, 60)
    return Recipe(make(Mlp), loss, {"train": batches(x, y, 8)}, loss_kind="cross_entropy", query=read)
"""


def read(text):
    values = [float(part) for part in text.split()]
    return torch.tensor([values[:-1]]), torch.tensor([int(values[-1])])


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    x, y = data(Mlp, 60)
    path = folder / "train.zarr"
    ooc.extract_gradients(make(Mlp), loss, batches(x, y, 8), path, compressor=ooc.Dropout(k=200),
                          loss_kind="cross_entropy")  # fmt: skip
    ooc.fit_fisher(path)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": f"vector {row}"}) + "\n" for row in range(60)))
    return path


@pytest.fixture(scope="module")
def server(train):
    recipe = ooc.Recipe(make(Mlp), loss, {}, loss_kind="cross_entropy", query=read)
    model = RecipeModel(recipe, "vectors")
    with live_report(train, train, model=model, data=train.parent / "train.jsonl", top=4, title="Live") as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    given = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
    connection.request(method, path, body, given)
    answer = connection.getresponse()
    text = answer.read().decode("utf-8", "replace")
    connection.close()
    return answer, text


def typed(row):
    x, y = data(Mlp, 100)
    return " ".join(str(float(value)) for value in x[row]) + f" {int(y[row])}"


def finish(server, job):
    end = time.monotonic() + 60
    while job["state"] in ("waiting", "running") and time.monotonic() < end:
        time.sleep(0.02)
        job = json.loads(ask(server, "GET", f"/{server.token}/api/jobs/{job['job']}")[1])
    return job


def submit(server, values):
    body = json.dumps(values)
    return json.loads(ask(server, "POST", f"/{server.token}/api/query", body, Content_Type="application/json")[1])


def test_an_answer_is_the_librarys(server, train, tmp_path):
    x, y = data(Mlp, 100)
    ooc.extract_gradients(make(Mlp), loss, [(x[70:71], y[70:71])], tmp_path / "q.zarr", like=train)
    expected = ooc.top_influential(tmp_path / "q.zarr", train, top=4)
    job = finish(server, submit(server, {"text": typed(70)}))
    assert job["state"] == "done", job
    for side in ("proponents", "opponents"):
        rows, scores = zip(*job["result"]["query"][side], strict=True)
        ranking = getattr(expected, side)
        assert list(rows) == ranking.rows[0].tolist()
        assert scores == pytest.approx(ranking.scores[0].tolist(), rel=1e-4)
        assert all(job["result"]["examples"][str(row)]["text"] == f"vector {row}" for row in rows)
    assert job["result"]["query"]["text"] == typed(70)


def test_queries_share_what_was_opened_until_it_is_replaced(server, train, monkeypatch):
    """The curvature and its eigenvectors are not read again with every query; a later fit is noticed."""
    opened, read = [], []
    open_one, read_one = Curvature.open.__func__, eigen.read_array
    monkeypatch.setattr(Curvature, "open", classmethod(lambda *asked: opened.append(asked) or open_one(*asked)))
    monkeypatch.setattr(eigen, "read_array", lambda *asked: read.append(asked) or read_one(*asked))
    for _ in range(3):
        assert finish(server, submit(server, {"text": typed(3)}))["state"] == "done"
    assert opened == []
    assert len(read) <= 1  # another test may have asked before
    ooc.fit_fisher(train, refit=True)
    opened.clear()
    read.clear()
    for _ in range(3):
        assert finish(server, submit(server, {"text": typed(3)}))["state"] == "done"
    assert len(opened) == len(read) == 1


def test_bad_queries_are_said_in_one_line(server):
    for values, message in (
        ({"text": ""}, "received an empty one"), ({}, "received an empty one"), ({"text": 3}, "received an empty one"),
        ({"text": "abc"}, "that the recipe vectors can read"), ({"text": "1 2 3"}, "unexpected"),
    ):  # fmt: skip
        job = finish(server, submit(server, values))
        assert job["state"] == "failed"
        assert message in job["error"]
        assert "\n" not in job["error"] or "unexpected" in job["error"]
    assert finish(server, submit(server, {"text": typed(3)}))["state"] == "done"


def test_only_the_token_opens(server):
    own = f"/{server.token}"
    answer, text = ask(server, "GET", f"{own}/")
    assert (answer.status, "ooc-influence-report" in text) == (200, True)
    assert "connect-src &#39;self&#39;" in text
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in answer.headers
    port = server.server_port
    refused = [
        ("GET", "/", {}, 404), ("GET", f"{own[:-1]}/", {}, 404), ("GET", "/x" + own, {}, 404), ("GET", own, {}, 404),
        ("GET", "/index.html", {}, 404), ("GET", f"{own}/", {"Host": "evil.example"}, 421),
        ("GET", f"{own}/", {"Host": f"evil.example:{port}"}, 421), ("GET", f"{own}/../../etc/passwd", {}, 404),
        ("GET", f"{own}/%2e%2e/secret", {}, 404), ("GET", f"{own}//etc/passwd", {}, 404),
        ("GET", f"{own}/api/jobs/unknown", {}, 404), ("PUT", f"{own}/", {}, 501), ("OPTIONS", f"{own}/", {}, 501),
    ]  # fmt: skip
    for method, path, headers, status in refused:
        assert ask(server, method, path, **headers)[0].status == status, (method, path, headers)
    assert ask(server, "GET", f"{own}/", Host=f"localhost:{port}")[0].status == 200


def test_only_the_page_may_ask(server):
    path, body = f"/{server.token}/api/query", json.dumps({"text": typed(1)})
    good = {"Content_Type": "application/json"}
    refused = [
        (good | {"Origin": "http://evil.example"}, body, 403), (good | {"Origin": "null"}, body, 403),
        (good | {"Sec_Fetch_Site": "cross-site"}, body, 403), ({"Content_Type": "text/plain"}, body, 415),
        (good | {"Content_Length": str(LARGEST + 1)}, "", 413), (good, "[1]", 400), (good, "{", 400),
    ]  # fmt: skip
    for headers, text, status in refused:
        assert ask(server, "POST", path, text, **headers)[0].status == status, headers
    assert ask(server, "POST", "/wrong/api/query", body, **good)[0].status == 404
    assert ask(server, "POST", f"/{server.token}/api/other", body, **good)[0].status == 404
    origin = f"http://127.0.0.1:{server.server_port}"
    answer, text = ask(server, "POST", path, body, **good, Origin=origin, Host=origin.removeprefix("http://"))
    assert answer.status == 202
    assert finish(server, json.loads(text))["state"] == "done"


def test_a_page_without_a_model_or_a_token(train):
    with live_report(train, token=False, suspects=5) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        answer, text = ask(found, "GET", "/")
        assert (answer.status, "connect-src &#39;none&#39;" in text) == (200, True)
        assert ask(found, "GET", "/assets/icon.svg")[0].headers["Content-Type"] == "image/svg+xml"
        assert ask(found, "GET", "/", Host="evil.example")[0].status == 421
        body = {"body": json.dumps({"text": "a"}), "Content_Type": "application/json"}
        assert ask(found, "POST", "/api/query", **body)[0].status == 404
        with (
            pytest.raises(InputError, match="expected a free port"),
            live_report(train, listen=("127.0.0.1", found.server_port), suspects=5),
        ):
            pass
        found.shutdown()
        thread.join()
    assert not found.folder.exists()


def test_an_address_that_others_reach_is_warned_of(train):
    for token, message in (
        (True, "listening on 0.0.0.0: other machines"),
        (False, "on 0.0.0.0 WITHOUT A TOKEN: anybody"),
    ):
        with (
            pytest.warns(OocInfluenceWarning, match=message),
            live_report(train, token=token, listen=("0.0.0.0", 0), suspects=5),
        ):
            pass
    for host in ("127.0.0.1", "localhost", "127.0.0.2"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PageServer(train, host=host, token=False).server_close()


def test_a_reader_who_leaves_is_no_error(server, capfd):
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            request = f"GET /{server.token}/data/index.js HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by a reset
            connection.sendall(request.encode())
    assert ask(server, "GET", f"/{server.token}/")[0].status == 200
    time.sleep(0.1)
    assert "Traceback" not in capfd.readouterr().err


def test_progress_is_watched_and_stops():
    seen, stop = [], False

    def watcher(*values):
        seen.append(values)
        if stop:
            raise InterruptedError("stopped")

    with watched(watcher), Progress("work", 10, None) as bar:
        bar.advance(3)
        bar.advance(4)
        stop = True
        with pytest.raises(InterruptedError):
            bar.advance(1)
    assert seen == [("work", 0, 10), ("work", 3, 10), ("work", 7, 10), ("work", 8, 10)]
    with Progress("unwatched", 10, None) as bar:
        bar.advance(1)
    assert len(seen) == 4


def test_jobs_run_in_order_stop_and_end():
    release, began = threading.Event(), threading.Event()

    def answer(values):
        if values["text"] == "slow":
            with Progress("scores", 100, None) as bar:
                bar.advance(40)
                began.set()
                release.wait(20)
                bar.advance(1)
        return {"said": values["text"]}

    jobs = Jobs(answer)
    slow, quick = jobs.submit({"text": "slow"}), jobs.submit({"text": "quick"})
    assert began.wait(20)
    state = jobs.state(slow["job"])
    assert (state["state"], state["stage"], state["done"], state["total"]) == ("running", "scores", 40, 100)
    assert (jobs.state(quick["job"])["state"], jobs.state(quick["job"])["ahead"], state["ahead"]) == ("waiting", 1, 0)
    assert jobs.stop(slow["job"])
    release.set()
    end = time.monotonic() + 20
    while jobs.state(quick["job"])["state"] != "done" and time.monotonic() < end:
        time.sleep(0.01)
    assert jobs.state(slow["job"])["state"] == "stopped"
    assert jobs.state(quick["job"])["result"] == {"said": "quick"}
    release.clear()
    began.clear()
    jobs.submit({"text": "slow"})
    assert began.wait(20)
    for number in range(8):
        jobs.submit({"text": str(number)})
    with pytest.raises(InputError, match="fewer than 8 queries waiting"):
        jobs.submit({"text": "one more"})
    threading.Timer(0.1, release.set).start()
    jobs.close()
    assert not any(thread.name == "ooc_influence-jobs" and thread is jobs._thread for thread in threading.enumerate())


@pytest.fixture
def held_jobs():
    """Jobs that run until they are let go; ``began`` says that one does."""
    release, began = threading.Event(), threading.Event()

    def answer(values):
        began.set()
        release.wait(60)
        if values["text"] == "looks":
            with Progress("scores", 1, None):
                pass
        return {}

    jobs = Jobs(answer)
    jobs.release, jobs.began = release, began
    yield jobs
    release.set()
    jobs.close(60)


def ended(jobs, job):
    end = time.monotonic() + 60
    while jobs.state(job["job"])["state"] in ("waiting", "running") and time.monotonic() < end:
        time.sleep(0.01)
    return jobs.state(job["job"])["state"]


@pytest.mark.parametrize("text", ["looks", "does not look"])
def test_a_stop_is_of_one_job_whenever_it_comes(held_jobs, text):
    """Of one that waits, that runs, or whose last block is done; another person's keeps running."""
    running, other, waiting, last = (held_jobs.submit({"text": text}) for _ in range(4))
    assert held_jobs.stop(waiting["job"])  # right after the submit
    assert held_jobs.state(waiting["job"])["state"] == "stopped"
    assert held_jobs.state(last["job"])["ahead"] == 2
    assert held_jobs.began.wait(60)
    assert held_jobs.stop(running["job"])
    assert not held_jobs.stop("another")
    held_jobs.release.set()
    assert [ended(held_jobs, job) for job in (running, other, waiting, last)] == ["stopped", "done", "stopped", "done"]
    assert held_jobs.stop(other["job"])  # too late: it is done
    assert held_jobs.state(other["job"])["state"] == "done"


def test_what_is_stopped_leaves_its_place_and_what_runs_is_not_forgotten(held_jobs):
    running = held_jobs.submit({"text": ""})
    assert held_jobs.began.wait(60)
    for _ in range(40):
        assert held_jobs.stop(held_jobs.submit({"text": ""})["job"])
    assert held_jobs.state(running["job"])["state"] == "running"
    held_jobs.release.set()
    assert ended(held_jobs, running) == "done"


def test_a_stop_names_its_job(server, held_jobs, monkeypatch):
    monkeypatch.setattr(server, "jobs", held_jobs)
    mine, another = submit(server, {"text": ""}), submit(server, {"text": ""})

    def stop(values):
        told = {"Content_Type": "application/json"}
        return ask(server, "POST", f"/{server.token}/api/stop", json.dumps(values), **told)[0].status

    assert [stop(values) for values in ({}, {"job": 7}, {"job": "none"})] == [400, 400, 404]
    assert stop({"job": mine["job"]}) == 200
    held_jobs.release.set()
    assert (ended(held_jobs, mine), ended(held_jobs, another)) == ("stopped", "done")


def test_stop_on_the_page_is_of_its_own_query(page, server):
    """Pressed before the server has answered that it has the query, too."""
    page.open(server.url)
    page.go("ask")
    page.run(
        "window.told = []; const job = (state) => ({ job: 'x', state, stage: '', done: 0, total: null, ahead: 0 });"
        "let state = 'waiting'; window.fetch = async (address, { body } = {}) => {"
        "if (address === 'api/stop') { told.push(body); state = 'stopped'; }"
        "if (address === 'api/query') await new Promise((go) => { window.accept = go; });"
        "return { ok: true, json: async () => job(state) }; };"
    )
    page.find("#ask-text").send_keys(typed(80))
    page.find("button.main").click()
    page.wait("return Boolean(window.accept)")
    page.run("[...document.querySelectorAll('button')].find((own) => own.innerText === 'Stop').click()")
    assert page.run("return told") == []
    page.run("window.accept()")
    page.wait("return document.querySelector('#answer .notice')?.innerText === 'stopped'")
    assert page.run("return told") == ['{"job":"x"}']


def test_a_recipe_without_query_is_refused():
    with pytest.raises(InputError, match="with query="):
        RecipeModel(ooc.Recipe(make(Mlp), loss, {}), "mine")


def test_the_page_asks(page, server):
    page.open(server.url)
    assert page.texts("#pages a")[0] == "Ask"
    page.go("ask")
    page.find("#ask-text").send_keys(typed(80))
    page.find("button.main").click()
    page.wait("return document.querySelectorAll('#answer .card').length === 8", seconds=60)
    assert page.texts("#answer .card .text")[0].startswith("vector ")
    page.fill("#ask-text", "<script>window.hacked = 1</script>")
    page.find("button.main").click()
    page.wait("return document.querySelector('#answer .notice')?.innerText.includes('can read')")
    page.go("queries/3")
    page.wait("return document.querySelector('.query h2')?.innerText === 'Query 3'")
    page.go("labels")
    assert page.run("return window.hacked ?? null") is None
    own = f"http://127.0.0.1:{server.server_port}/{server.token}/"
    assert all(address.startswith((own, "about:blank", "blob:")) for address in page.requests())
    assert page.logs() == []


def test_a_page_waits_for_a_query_only_where_there_is_one(page, server):
    page.open(server.url)
    page.go("ask")
    page.run(
        "window.ahead = 0; const job = () => ({ job: 'x', state: 'waiting', stage: '', done: 0, total: null, ahead });"
        "window.fetch = async () => ({ ok: true, json: async () => job() });"
    )
    page.find("#ask-text").send_keys(typed(80))
    page.find("button.main").click()
    for ahead, said in ((0, "starting…"), (1, "waiting for 1 query before"), (3, "waiting for 3 queries before")):
        page.run("window.ahead = arguments[0]", ahead)
        page.wait("return document.querySelector('form p').innerText.startsWith(arguments[0])", said)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore:gradients cover")
def test_a_hugging_face_model_is_asked(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    from tiny_hf import make_model

    from ooc_influence import hf
    from ooc_influence.report.live_query import HuggingFaceModel

    make_model(tmp_path / "model")
    texts = [" ".join(f"w{(row * 7 + place) % 40}" for place in range(10)) for row in range(30)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    small = ooc.Dropout(k=300)
    train = hf.extract(tmp_path / "model", tmp_path / "corpus.jsonl", tmp_path / "t.zarr", compressor=small)
    ooc.fit_fisher(train)
    model = HuggingFaceModel(tmp_path / "model")
    assert model.fields == ("text",)
    with live_report(train, model=model, data=Corpus(tmp_path / "corpus.jsonl"), top=3) as server:
        found = server.jobs.submit({"text": texts[11]})
        end = time.monotonic() + 60
        while server.jobs.state(found["job"])["state"] in ("waiting", "running") and time.monotonic() < end:
            time.sleep(0.02)
        job = server.jobs.state(found["job"])
        assert job["state"] == "done", job
        best = job["result"]["query"]["proponents"][0][0]
        assert (best, job["result"]["examples"][best]["text"]) == (11, texts[11])
        assert job["result"]["query"]["loss"] == pytest.approx(float(train.loss[11]), rel=1e-4)
        long = server.jobs.submit({"text": " ".join(texts[:4])})  # longer than the context: the mean of its pieces
        while server.jobs.state(long["job"])["state"] in ("waiting", "running") and time.monotonic() < end:
            time.sleep(0.02)
        assert server.jobs.state(long["job"])["result"]["query"]["more"] == {"rows": 3}


def test_ctrl_c_ends_it_cleanly(train, tmp_path):
    (tmp_path / "my.py").write_text(RECIPE)
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    starter = "from ooc_influence.cli.main import main; main()"
    command = [sys.executable, "-c", starter, "serve", str(train), "--recipe", "my.py:recipe"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    stops = (signal.SIGINT, signal.SIGTERM)
    processes = [subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) for _ in stops]
    for stop, process in zip(stops, processes, strict=True):
        url = re.search(r"open (\S+)", process.stdout.readline())[1]
        assert urlsplit(url).hostname == "127.0.0.1"
        connection = http.client.HTTPConnection("127.0.0.1", urlsplit(url).port, timeout=20)
        body = json.dumps({"text": typed(70)})
        connection.request("POST", urlsplit(url).path + "api/query", body, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 202
        connection.close()
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert err.strip().splitlines()[-1] == "stopped"
        assert "Traceback" not in err, err
    assert list((tmp_path / "tmp").glob("ooc_influence-*")) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--recipe my_recipe.py:recipe", "with query="),
        ("--recipe my_recipe.py:recipe --model m", "--model or --recipe; received both"),
        ("--port 70000", "70000"),
        ("--query-data q.jsonl", "expected queries (--queries) with --query-data; received none"),
        (
            "--host no-such-host.invalid",
            "expected an IPv4 address of this machine to listen on (--host); received no-such",
        ),
        ("--host 192.0.2.1", "expected an IPv4 address of this machine to listen on (--host); received 192.0.2.1:"),
        ("--host a..b", "expected an IPv4 address of this machine to listen on (--host); received a..b:"),
        ("--recipe other.py:recipe", " of the recipe other.py:recipe: name the model"),
    ],
)
def test_a_mistake_is_one_line(run, train, line, message, tmp_path):  # noqa: F811
    other = RECIPE.replace(
        "return Recipe(make(Mlp)", "model = make(Mlp)\n    model.first.weight.data += 1\n    return Recipe(model"
    )
    (tmp_path / "other.py").write_text(other)
    (tmp_path / "q.jsonl").write_text('{"text": "a"}\n')
    code, out, err = run(f"serve {train} {line}")
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("Usage") or len(err.splitlines()) == 1
    assert "--other-model" not in err
