"""Questions go into Label Studio's own server, three people answer, and its export comes back.

The server has an environment of its own (`make test-label-studio`), as its packages are many.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from prepared import pairs
from test_ask import CONVERSATIONS, TEXTS, asked_of, config_of, with_prepare

from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

SERVER = os.environ.get("CWPO_LABEL_STUDIO", "")
WHO = {
    "username": "somebody@example.org",
    "password": "a-long-password",  # pragma: allowlist secret
}
SAID = [("a", "a", "a"), ("b", "b", "a"), ("tie", "tie", "a")]  # by three people, of each question

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path(SERVER).is_file(), reason="needs CWPO_LABEL_STUDIO, its command"),
]


class Studio:
    """A logged-in session."""

    def __init__(self, url: str) -> None:
        self.url, self.session = url, requests.Session()
        self.session.get(f"{url}/user/login/")
        told = {"email": WHO["username"], "password": WHO["password"]}
        token = {"csrfmiddlewaretoken": self.session.cookies["csrftoken"]}
        login = f"{url}/user/login/"
        self.session.post(login, data=told | token, headers={"Referer": login})

    def post(self, path: str, value: Any) -> Any:
        headers = {"X-CSRFToken": self.session.cookies["csrftoken"], "Referer": self.url}
        said = self.session.post(f"{self.url}/api/{path}", json=value, headers=headers)
        assert said.status_code == 201, said.text
        return said.json()

    def get(self, path: str) -> Any:
        return self.session.get(f"{self.url}/api/{path}").json()


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("studio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [SERVER, "start", "--no-browser", "--port", str(port), "--data-dir", str(folder)]
    command += [word for name, value in WHO.items() for word in (f"--{name}", value)]
    env = os.environ | {"COLLECT_ANALYTICS": "False", "SENTRY_DSN": ""}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 600
    while True:
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                break
        except requests.ConnectionError:
            assert server.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < end, "it does not answer"
        time.sleep(1)
    yield Studio(url)
    server.terminate()
    server.wait()


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("rows", [TEXTS, CONVERSATIONS], ids=["texts", "conversations"])
def test_three_peoples_choices_come_back_as_votes(
    studio: Studio, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    config = config_of(tmp_path, rows)
    asked = asked_of(config)
    (place,) = (tmp_path / "run" / "ask").iterdir()
    layout = (place / "label_studio.xml").read_text()
    project = studio.post("projects/", {"title": "Questions", "label_config": layout})["id"]
    tasks = json.loads((place / "label_studio.json").read_text())
    assert studio.post(f"projects/{project}/import", tasks)["task_count"] == len(rows)
    found = studio.get(f"tasks/?project={project}&page_size=100")["tasks"]
    said = dict(zip((row["pair_id"] for row in asked), SAID * 3, strict=False))
    for task in found:
        for choice in said[task["data"]["pair_id"]]:
            result = {"from_name": "winner", "to_name": "prompt", "type": "choices"}
            result |= {"value": {"choices": [choice]}}
            studio.post(f"tasks/{task['id']}/annotations/", {"result": [result]})
    export = tmp_path / "project.json"
    export.write_text(json.dumps(studio.get(f"projects/{project}/export?exportType=JSON_MIN")))
    label = {"from": ["winner"], "a": "a", "b": "b", "tie": "tie"}
    source = {"path": str(export), "into": "train", "columns": {"label": label}}
    told = with_prepare(config, sources=[config.prepare.sources[0].model_dump(), source])
    store = Store(str(tmp_path / "again"))
    counts = prepare(store, told.prepare, told.seed)
    assert not any(counts["rejects"].values())
    assert counts["merged_duplicates"] == 3 * len(rows)
    for pair in pairs(store):
        votes = tuple(pair[f"votes_{x}"] for x in ("a", "b", "tie"))
        wanted = said[pair["pair_id"]]
        assert votes == tuple(wanted.count(x) for x in ("a", "b", "tie"))
        assert (pair["label"] or "tie") == wanted[0], "what two of three said"
