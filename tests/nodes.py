"""Ray nodes as machines: each in a process group of its own, to be told to end or to be killed."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from tests import sweeps

RAY = str(Path(sys.executable).with_name("ray"))


class Nodes:
    """A cluster on this machine whose head runs no trial."""

    def __init__(self, head: Cluster, environment: dict[str, str]) -> None:
        self.head = head
        self.address: str = head.address
        self.environment = environment
        self.started: list[psutil.Popen] = []

    def start(self, cpus: int, **variables: str) -> psutil.Popen:
        """A node with so many cores, once the cluster has it; its trials get `variables`, too."""
        options = [f"--address={self.address}", f"--num-cpus={cpus}", "--block", "--disable-usage-stats"]
        known = set(self.head.global_state._live_node_ids())
        node = psutil.Popen(
            [RAY, "start", *options],
            env=self.environment | variables,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
        )
        self.started.append(node)
        began = time.monotonic()
        while not set(self.head.global_state._live_node_ids()) - known:
            assert time.monotonic() - began < 60, "the node did not join"
            time.sleep(0.1)
        return node


def kill(node: psutil.Popen) -> None:
    """SIGKILL for all that runs on a node, as when the machine is gone."""
    if node.poll() is None:
        for process in [*node.children(recursive=True), node]:
            with suppress(psutil.NoSuchProcess):  # with its parent
                process.kill()
        node.wait()


def trial_processes(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those of them that train."""
    return called(processes, r"Trainable|SlicedTrial")  # in a call, and between two


def called(processes: list[psutil.Process], pattern: str) -> list[psutil.Process]:
    """Those of them in whose command the pattern is found."""
    found = []
    for process in processes:
        with suppress(psutil.Error):  # it has just ended
            if re.search(pattern, " ".join(process.cmdline())):
                found.append(process)
    return found


@contextmanager
def cluster(**variables: str) -> Iterator[Nodes]:
    """A cluster without nodes for trials; those that are started in it end with the block.

    `variables` are added to the environment of its trials, which is that of their node.
    """
    nodes = Nodes(Cluster(initialize_head=True, head_node_args={"num_cpus": 0}), sweeps.environment(**variables))
    try:
        yield nodes
    finally:
        for node in nodes.started:
            kill(node)
        nodes.head.shutdown()
