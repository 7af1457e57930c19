"""The Ray cluster that a sweep runs on: one of its own on this machine, or one that it joins."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from sweep.preemption import shielded_from_signals
from sweep.validation import Refused, counted

QUIET_RAY = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a metric reads its files where the sweep was started, in trials as in the driver
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a trial that asks for no GPU sees none
    "RAY_enable_worker_prestart": "0",  # trials run in processes of another kind: these would idle
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 leaves trials 3 % of a core that another process wants
    "RAY_memory_monitor_refresh_ms": "0",  # Tune ends the whole run on the error that its kills raise
    "RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE": "1",  # else Tune hands a preempted trial out again, beside us
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # most slices carry no validation loss
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the table says it
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours drains instead
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@contextmanager
def ray_cluster(address: str, cpus: float, gpus: float, leave: bool) -> Iterator[list[int]]:
    """A Ray cluster for the block; gives how many trials fit side by side, for each machine that has room for one.

    With `leave` the connection, and a cluster that was started here, are left to end with this process, which the
    kernel sees to: the shutdown of Ray's processes, which are shielded from signals, takes seconds.
    """
    if ray.is_initialized():
        raise Refused("Ray is in use in this process already; call ray.shutdown() first (`address` joins a cluster)")
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET_RAY.items()})
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # it repeats what the ranking says of failed trials
    _check_address(address)
    try:
        with shielded_from_signals():
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        if address == "local":  # on a machine that is overloaded, as Ray waits for 30 s
            raise OSError(f"Ray did not start on this machine: {error}") from error
        raise Refused(
            f"--address {address}: no Ray cluster answers there ({error}); start one, or leave it out"
        ) from error
    try:
        found = machines()
        fits = [fit_on(machine, cpus, gpus) for machine in found]
        if not any(fits):
            wanted = {"CPU": cpus, "GPU": gpus}
            where = (
                "this machine has" if address == "local" else f"no machine of the cluster at {address} has more than"
            )
            most = {kind: max(machine.get(kind, 0) for machine in found) for kind in wanted}
            lacking = [
                f"resources.{kind.lower()}s: a trial asks for {amount:g}, {where} {most[kind]:g}"
                for kind, amount in wanted.items()
                if amount > most[kind]
            ] or [
                f"resources: a trial asks for {cpus:g} cpus and {gpus:g} gpus, which no machine of the cluster has both"
            ]
            raise Refused("\n".join([*lacking, "Ask for less, or join a cluster that has them with --address."]))
        yield [fit for fit in fits if fit]
    finally:
        if not leave:
            ray.shutdown()


def machines() -> list[Mapping[str, float]]:
    """What each machine of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def described(machine: Mapping[str, float]) -> str:
    """Its cores and GPUs."""
    kinds = [name.removeprefix("accelerator_type:") for name in machine if name.startswith("accelerator_type:")]
    gpus = f", {counted(int(machine['GPU']), 'GPU')} ({', '.join(kinds)})" if machine.get("GPU") else ""
    return f"{counted(int(machine.get('CPU', 0)), 'CPU core')}{gpus}"


def fit_on(machine: Mapping[str, float], cpus: float, gpus: float) -> int:
    """How many trials fit on a machine. Ray shares a GPU, but cuts no trial in two for what is left of several."""
    fit = machine.get("CPU", 0) / cpus
    if gpus:
        has = machine.get("GPU", 0)
        fit = min(fit, has / gpus if gpus >= 1 else has * int(1 / gpus + 1e-9))
    return int(fit + 1e-9)  # 1 / 0.2 is 5


def _check_address(address: str) -> None:
    """Refuse an address where nothing listens: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise Refused(
                f"--address {address}: nothing answers there ({error}); start a cluster with `ray start --head"
                f" --port={port}`, or leave it out"
            ) from error
