"""The compose file and the image it builds are what operators expect: valid, pinned, limited, watched, not root."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker-compose.yml"
PINNED = re.compile(r"[\w./-]+:\d+\.\d+[\w.-]*")
SERVICES = ["kafka", "redis", "postgres", "feed", "worker"]


@cache
def compose() -> dict[str, Any]:
    return cast("dict[str, Any]", YAML(typ="safe").load(FILE.read_text()))


def service(name: str) -> dict[str, Any]:
    return cast("dict[str, Any]", compose()["services"][name])


def test_file_is_valid_by_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_there_are_the_services_that_the_job_needs() -> None:
    assert sorted(compose()["services"]) == sorted(SERVICES)


@pytest.mark.parametrize("name", SERVICES)
def test_image_is_pinned(name: str) -> None:
    assert PINNED.fullmatch(service(name)["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_service_runs_without_root_or_capabilities_and_within_limits(name: str) -> None:
    user, _, group = service(name)["user"].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert service(name)["cap_drop"] == ["ALL"]
    assert service(name)["security_opt"] == ["no-new-privileges:true"]
    limits = service(name)["deploy"]["resources"]["limits"]
    assert float(limits["cpus"]) > 0
    assert re.fullmatch(r"\d+[mg]", limits["memory"])


def completed() -> set[str]:
    """Services that others wait for until they have ended: their exit code is their health."""
    return {
        name
        for each in compose()["services"].values()
        for name, wait in each.get("depends_on", {}).items()
        if wait["condition"] == "service_completed_successfully"
    }


@pytest.mark.parametrize("name", SERVICES)
def test_service_that_stays_has_a_bounded_health_check(name: str) -> None:
    if name in completed():
        assert service(name)["restart"] == "no"
        return
    check = service(name)["healthcheck"]
    assert check["test"][0] == "CMD"
    assert {"interval", "timeout", "retries"} <= check.keys()


def test_worker_starts_when_all_it_needs_is_there() -> None:
    waits = {name: wait["condition"] for name, wait in service("worker")["depends_on"].items()}
    assert waits == {
        "kafka": "service_healthy",
        "redis": "service_healthy",
        "postgres": "service_healthy",
        "feed": "service_completed_successfully",
    }


def test_worker_can_be_scaled() -> None:
    """Nothing that two of them cannot have at once: a name, a port of the host, a volume."""
    worker = service("worker")
    assert "container_name" not in worker
    assert "hostname" not in worker
    assert all(re.fullmatch(r"127\.0\.0\.1::\d+", port) for port in worker["ports"]), "a free port, on loopback"
    assert all(":" not in volume for volume in worker["volumes"])


@pytest.mark.parametrize("name", ["kafka", "redis", "postgres"])
def test_server_keeps_its_data_in_a_named_volume(name: str) -> None:
    names = {volume.split(":")[0] for volume in service(name)["volumes"]}
    assert names <= compose()["volumes"].keys()


def test_servers_are_set_up_for_exactly_once() -> None:
    command = service("redis")["command"]
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
    assert command[command.index("--appendonly") + 1] == "yes"
    assert service("kafka")["environment"]["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"


def test_image_is_built_from_a_pinned_base_and_runs_as_the_user_that_owns_its_data() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert bases
    assert all(PINNED.fullmatch(base) for base in bases)
    assert [line for line in lines if line.startswith("USER ")] == [f"USER {service('worker')['user']}"]
    assert not any(re.match(r"(ADD|COPY) (--\S+ )*\. ", line) for line in lines), "copies name what they copy"


def test_image_copies_only_what_the_repository_has() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    sources = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    # The readme is written last of all and is no part of this test.
    assert [source for source in sources if source != "README.md" and not (ROOT / source).exists()] == []
