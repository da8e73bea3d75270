"""All checks that a role calls for, in the order in which a run would trip over them."""

import datetime
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bora_fl.client.worker.address import WorkerSettings
from bora_fl.config import ConfigError, Scalar, Settings
from bora_fl.data import load_dataset
from bora_fl.deployment.doctor import federation, machine, network, secrets, software
from bora_fl.deployment.doctor.finding import Finding
from bora_fl.deployment.doctor.policy import check_policy
from bora_fl.deployment.doctor.registration import check_registered
from bora_fl.deployment.doctor.worker import check_worker
from bora_fl.paths import cache_folder

Role = Literal["server", "site", "all"]


@dataclass(frozen=True)
class Setup:
    """What is known of a machine's part in a federation; None and empty where it is not.

    Attributes:
        role: Whose checks are made.
        run_config: Overrides of the run config.
        superlink: ``host:port`` that the sites dial.
        authority: ``ca.crt``.
        certificate: The server's.
        key: The server's, for the certificate.
        site_key: The SuperNode's.
        secret: The SuperExec's.
        database: The SuperLink's.
        worker: The site's.
        policy: The site's.
        client: Certificate and key that a proxy before the SuperLink asks for.
    """

    role: Role
    run_config: Mapping[str, Scalar]
    superlink: str = ""
    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    site_key: Path | None = None
    secret: Path | None = None
    database: Path | None = None
    worker: WorkerSettings | None = None
    policy: Path | None = None
    client: tuple[Path, Path] | None = None


def examine(setup: Setup) -> Iterator[Finding]:
    """Make every check of a role; a check whose ground is missing is left out."""
    server, site = setup.role in {"server", "all"}, setup.role in {"site", "all"}
    yield from software.check_versions()
    yield from _certificates(setup)
    readable = False
    if setup.site_key and site:
        key = secrets.check_site_key(setup.site_key)
        readable = key.level != "fail"
        yield key
    if setup.secret:
        yield secrets.check_private(setup.secret)
    if setup.client:
        yield from _client(*setup.client)
    if site:
        yield check_policy(setup.policy)
    if setup.worker and site:
        yield check_worker(setup.worker)
    if setup.superlink:
        host, port = split(setup.superlink)
        reachable, answer = network.check_reachable(host, port, setup.authority, setup.client)
        yield reachable
        if answer:
            yield network.check_clock(answer.skew)
            if site and setup.site_key and readable:
                yield check_registered(host, port, setup.authority, setup.site_key, setup.client)
    elif site:
        yield Finding("SuperLink", "warn", "its address is not known", "give --superlink HOST:PORT or a connection")
    findings, settings = federation.check_config(setup.run_config)
    yield from findings
    if settings is None:
        return
    if server:
        yield federation.check_strategy(settings)
    data, labels = federation.check_data(settings)
    yield data
    model, sizes = federation.check_model(settings, labels)
    yield model
    if settings.model.task == "causal-lm" and "fail" not in (data.level, model.level):
        yield federation.check_examples(settings)
    if sizes:
        yield from _machine(setup, settings, sizes, server)
    if site and "fail" not in (data.level, model.level):
        found = settings.model_copy(update={"data": load_dataset(settings.data).settings})
        yield machine.check_memory(found, labels)


def connection(name: str, config: Path) -> tuple[str, Path | None]:
    """Address and authority of a SuperLink connection in Flower's config.

    Raises:
        ConfigError: If there is none of that name.
    """
    try:
        known = tomllib.loads(config.read_text()).get("superlink", {})
        found = known[name]
        address = str(found["address"])
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"connection {name!r}: {config} does not hold it ({type(error).__name__}: {error})") from None
    authority = found.get("root-certificates")
    return address, Path(str(authority)).expanduser() if authority else None


def split(address: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        ConfigError: If it is not ``host:port``.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--superlink {address!r}: write host:port, such as server.example.org:8443")
    return host.strip("[]"), int(port)


def _certificates(setup: Setup) -> Iterator[Finding]:
    now = datetime.datetime.now(datetime.UTC)
    loaded = {}
    for subject, path in (("authority", setup.authority), ("certificate", setup.certificate)):
        if path is None:
            continue
        found = secrets.load_certificate(path)
        if isinstance(found, Finding):
            yield found
            continue
        loaded[subject] = found
        yield secrets.check_expiry(f"{subject} {path}", found, now)
    certificate = loaded.get("certificate")
    if certificate is None:
        return
    if "authority" in loaded:
        yield secrets.check_chain(certificate, loaded["authority"])
    if setup.superlink:
        yield secrets.check_name(certificate, split(setup.superlink)[0])
    if setup.key:
        yield secrets.check_pair(certificate, setup.key)


def _client(certificate: Path, key: Path) -> Iterator[Finding]:
    found = secrets.load_certificate(certificate)
    if isinstance(found, Finding):
        yield found
        return
    yield secrets.check_expiry(f"client certificate {certificate}", found, datetime.datetime.now(datetime.UTC))
    yield secrets.check_pair(found, key)


def _machine(setup: Setup, settings: Settings, sizes: federation.Sizes, server: bool) -> Iterator[Finding]:
    yield machine.check_cores(settings.run.threads)
    if server:
        needed = machine.checkpoint_bytes(sizes.adapter, settings.run.keep_checkpoints)
        yield machine.check_folder("results in", federation.result_folder(settings), needed)
        yield secrets.check_shared(federation.result_folder(settings) / "metrics.jsonl")
    if server and setup.database:
        yield secrets.check_shared(setup.database)
        # Every message of every site passes through the database once in each direction.
        yield machine.check_folder("database", setup.database.resolve().parent, 10 * sizes.adapter)
    if setup.role in {"site", "all"}:
        yield machine.check_folder("cache", cache_folder(), sizes.adapter)
