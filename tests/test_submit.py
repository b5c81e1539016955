"""Jobs on a real Ray head on loopback: sent, followed, attached to, refused, stopped."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import yaml
from conftest import ROOT
from ray_head import RAY, free_ports, started_head

from cwpo_dist import credentials
from cwpo_dist.cli import app as cli
from cwpo_dist.cli import job_server
from cwpo_dist.cli import submit as submission
from cwpo_dist.cli.job_server import other_cluster
from cwpo_dist.cli.portable import portable
from cwpo_dist.cli.submit import (
    Settings,
    SubmitError,
    Submitted,
    _packed,
    follow,
    job_name,
    logs,
    status,
    stop,
    submit,
)
from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import parse_config

IMAGE = "registry.example.com/team/cwpo_dist:0.1.0"
SECRET = "hf_a-secret-of-this-test"


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The job server of a Ray head that this module starts, and stops."""
    with started_head(answers) as url:
        yield url


def answers(url: str) -> bool:
    try:
        status("no-such-job", url)
    except SubmitError as error:
        return "does not exist" in str(error)
    return False


def wait_for(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.5)


def small(folder: Path) -> Config:
    """Pairs that are quick to prepare."""
    rows = [{"prompt": f"p{i}", "chosen": "yes indeed", "rejected": "no"} for i in range(40)]
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"sources": [{"path": str(source)}], "num_cpus": 0.5}
    return parse_config({"output_dir": str(folder / "run"), "prepare": sections})


def on_this_python() -> Settings:
    return Settings(python=sys.executable)


def test_a_stage_runs_on_the_cluster(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    config = small(tmp_path)
    job = submit(config, "prepare", head, on_this_python())
    assert not job.attached
    with pytest.raises(SubmitError, match=r"still PENDING after 0 s.*--pending-timeout"):
        follow(job.submission_id, head, lambda text: None, pending_timeout_s=0.0)

    printed: list[str] = []
    assert follow(job.submission_id, head, printed.append), "".join(printed)
    assert list((tmp_path / "run" / "prepare").glob("*/manifest.json"))
    assert "".join(printed) == logs(job.submission_id, head)
    assert status(job.submission_id, head).startswith("SUCCEEDED")
    assert SECRET not in "".join(printed)

    again = submit(config, "prepare", head, on_this_python())
    assert again == Submitted(f"{job.submission_id}-2", attached=False)
    stop(again.submission_id, head)


def test_a_head_that_is_not_ready_for_jobs_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the server: twice it has no agent, then it takes the job; or it never has."""
    said = RuntimeError(
        "status code 500: No available agent to submit job, please try again later."
    )
    answers: list[RuntimeError | str] = [said, said, "taken"]

    def send(submission_id: str) -> str:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, RuntimeError):
            raise answer
        return submission_id

    monkeypatch.setattr(submission, "POLL_S", 0.0)
    client: Any = SimpleNamespace(list_jobs=list)
    assert submission._attach_or_send(client, "name", "mark", send) == Submitted("name", False)
    assert answers == ["taken"]
    answers[:] = [said]
    monkeypatch.setattr(submission, "AGENT_S", 0.05)
    with pytest.raises(RuntimeError, match="No available agent"):
        submission._attach_or_send(client, "name", "mark", send)


def test_what_cannot_go_with_an_image_is_refused(tmp_path: Path) -> None:
    config, nowhere = small(tmp_path), "http://127.0.0.1:1"
    with pytest.raises(ConfigError, match="--image: 'a b' is not the name of an image"):
        submit(config, "run", nowhere, Settings(image="a b"))
    with pytest.raises(ConfigError, match="--image: Ray takes nothing else beside it"):
        submit(config, "run", nowhere, Settings(image=IMAGE, env=("HOME",)))
    (tmp_path / "chat.jinja").write_text("template")
    policy = {"model_name_or_path": "gpt2", "chat_template": str(tmp_path / "chat.jinja")}
    config = parse_config(config.model_dump(mode="json") | {"policy": policy})
    with pytest.raises(ConfigError, match=r"policy-chat\.jinja cannot travel with it"):
        submit(config, "run", nowhere, Settings(image=IMAGE))


def test_a_running_job_is_attached_to_and_stopped(head: str, tmp_path: Path) -> None:
    config = small(tmp_path)
    # Waits where the job's entrypoint would run, so that it is there for as long as we need it.
    slow = tmp_path / "slow-python"
    python = f'exec {sys.executable} "$@"'
    waits = 'echo "$*"; sleep 120'
    slow.write_text(f'#!/bin/sh\ncase "$*" in *cwpo_dist.cli.app*) {waits};; *) {python};; esac\n')
    slow.chmod(0o755)
    settings = Settings(python=str(slow), options=("--retry-rejects",))
    first = submit(config, "annotate", head, settings)
    wait_for(lambda: "config.yaml --retry-rejects" in logs(first.submission_id, head), 60)
    second = submit(config, "annotate", head, settings)
    assert (second.submission_id, second.attached) == (first.submission_id, True)

    other = config.model_copy(update={"seed": 1})
    for given, how in ((other, settings), (config, replace(settings, options=()))):
        with pytest.raises(SubmitError, match="another configuration"):
            submit(given, "annotate", head, how)

    assert stop(first.submission_id, head)
    assert follow(first.submission_id, head, lambda text: None) is False
    assert status(first.submission_id, head).startswith("STOPPED")


def test_the_command_line_reports_a_job_that_fails(head: str, tmp_path: Path) -> None:
    config = small(tmp_path).model_dump(mode="json")
    config["prepare"]["sources"][0]["path"] = str(tmp_path / "nowhere.jsonl")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "cwpo_dist.cli", "submit", "plan", str(path)]
    command += ["--address", head, "--python", sys.executable, "--price", "2.5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1, done.stderr
    assert "prepare.sources.0.path: nothing to read at" in done.stdout
    assert re.search(r"submitted cwpo-plan-run-[0-9a-f]{8}", done.stdout)


@pytest.mark.long
def test_a_job_script_is_enough_for_plain_ray_job_submit(head: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(small(tmp_path).model_dump(mode="json")))
    command = [RAY, "job", "submit", "--address", head, "--working-dir", str(ROOT), "--"]
    command += [sys.executable, "jobs/prepare.py", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "run" / "prepare").glob("*/manifest.json"))


def test_no_server_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(SubmitError, match=r"no Ray job server answers at .*Connection refused"):
        submit(small(tmp_path), "run", f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(
        SubmitError, match="'head:8265' is not the address of a job server; give http://HEAD:8265"
    ):
        submit(small(tmp_path), "run", "head:8265")


@pytest.mark.parametrize("elsewhere", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_address_that_is_given_wins(
    head: str,
    elsewhere: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Over the environment's, which is named, and over a proxy's way."""
    other = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv(elsewhere, other)
    monkeypatch.setenv("http_proxy", other)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(SubmitError, match="no-such-job does not exist"):
        status("no-such-job", head)
    for command in ("status", "logs", "stop"):
        with pytest.raises(SystemExit):
            cli.main([command, "no-such-job", "--address", head])
        said = capsys.readouterr()
        assert f"--address {head} is used, not {elsewhere}={other} of the env" in said.out
        assert "no-such-job does not exist" in said.err
    assert os.environ[elsewhere] == other
    assert "no_proxy" not in os.environ


def test_the_environments_address_is_named_where_it_is_another_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    for value, named in {
        "": None,
        "auto": None,
        "head:6379": None,  # the same head, by Ray's own port
        "ray://head:10001": None,
        "http://head:8265": None,
        "http://head:9999": "RAY_ADDRESS=http://head:9999",
        "other:6379": "RAY_ADDRESS=other:6379",
        "[other": "RAY_ADDRESS=[other",  # no address
    }.items():
        monkeypatch.setenv("RAY_ADDRESS", value)
        assert other_cluster("http://head:8265") == named


def test_a_server_that_never_answers_is_told_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_server, "CONNECT_S", 0.5)
    monkeypatch.setenv("http_proxy", "http://proxy.example.org:3128")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for ask in (status, logs, stop):
            with pytest.raises(SubmitError, match=f"no Ray job server answers at {url}") as error:
                ask("job", url)
            assert "It is asked directly, not through the proxy http://proxy.ex" in str(error.value)


def test_a_reader_that_has_gone_is_no_fault_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cwpo logs ID --follow | head` ends as any other command does before `head`."""
    monkeypatch.setattr(job_server, "_dial", lambda address: None)
    monkeypatch.setattr(job_server, "JobSubmissionClient", lambda address: None)
    with pytest.raises(BrokenPipeError), job_server.job_server("http://127.0.0.1:8265"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_credentials_travel_as_a_file_and_only_those_that_are_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in credentials.PASSED_ON:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("MY_SERVICE", "mine")
    monkeypatch.setenv("FSSPEC_HTTPS", '{"headers": {}}')
    monkeypatch.setenv("FSSPEC_CONFIG_DIR", "/here")
    credentials.pack(tmp_path, ["MY_SERVICE"])
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("WANDB_API_KEY", "the cluster's")
    for name in ("MY_SERVICE", "FSSPEC_HTTPS", "FSSPEC_CONFIG_DIR"):
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    credentials.take()  # in no job: anybody may have put such a file there
    assert os.environ["WANDB_API_KEY"] == "the cluster's"
    (tmp_path / "job").mkdir()
    environment: Any = _packed({}, "run", tmp_path / "job", Settings())[1]
    for name, value in environment["env_vars"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path.parent)
    credentials.take()  # elsewhere: there is no such file
    assert os.environ["WANDB_API_KEY"] == "the cluster's"
    monkeypatch.chdir(tmp_path)
    credentials.take()
    assert (os.environ["WANDB_API_KEY"], os.environ["MY_SERVICE"]) == (SECRET, "mine")
    assert fsspec.config.conf["https"] == {"headers": {}}, "also where it was imported before"
    assert os.environ.keys().isdisjoint({"HF_TOKEN", "FSSPEC_CONFIG_DIR"})


def test_the_whole_package_travels(tmp_path: Path) -> None:
    """Where nodes lack it, its modules are found by their own names in what Ray unpacks."""
    _, environment = _packed({}, "run", tmp_path, Settings())
    package = Path(environment["py_modules"][0])
    module, _, hook = environment["worker_process_setup_hook"].rpartition(".")
    name, _, file = module.partition(".")
    assert package.name == name
    assert f"def {hook}(" in (package / f"{file}.py").read_text()


def test_the_name_is_a_function_of_place_and_stage() -> None:
    name = job_name("s3://bucket/runs/my run", "align")
    assert re.fullmatch(r"cwpo-align-my-run-[0-9a-f]{8}", name)
    assert name == job_name("s3://bucket/runs/my run", "align")
    assert len({name, job_name("s3://other/my run", "align"), job_name("x", "run")}) == 3


def test_a_portable_config_finds_its_files_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "pairs.jsonl").write_text("{}")
    (tmp_path / "chat.jinja").write_text("template")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    config = parse_config(
        {
            "output_dir": "runs/x",
            "prepare": {"sources": [{"path": "pairs.jsonl"}, {"path": "Anthropic/hh-rlhf"}]},
            "policy": {"model_name_or_path": "gpt2", "chat_template": "chat.jinja"},
            "align": {"deepspeed": "ds.json"},
        }
    )
    data = portable(config, work)
    paths = [source["path"] for source in data["prepare"]["sources"]]
    assert data["output_dir"] == str(tmp_path / "runs" / "x")
    assert paths == [str(tmp_path / "pairs.jsonl"), "Anthropic/hh-rlhf"]
    assert data["policy"]["model_name_or_path"] == "gpt2"
    assert (work / data["policy"]["chat_template"]).read_text() == "template"
    assert data["align"]["deepspeed"] == {"zero_optimization": {"stage": 3}}
    parse_config(data)  # what travels is a valid configuration


def test_a_missing_template_is_named(tmp_path: Path) -> None:
    model = {"model_name_or_path": "gpt2", "chat_template": str(tmp_path / "no.jinja")}
    sources = {"sources": [{"path": "x"}]}
    config = parse_config({"output_dir": "s3://b/r", "prepare": sources, "policy": model})
    with pytest.raises(ConfigError, match=r"policy.chat_template: no file .*no\.jinja"):
        portable(config, tmp_path)


def test_variables_that_are_not_set_are_not_sent(tmp_path: Path, head: str) -> None:
    with pytest.raises(ConfigError, match="--env: NO_SUCH_VARIABLE is not set"):
        submit(small(tmp_path), "run", head, Settings(env=("NO_SUCH_VARIABLE",)))
