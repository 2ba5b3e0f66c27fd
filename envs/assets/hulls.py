"""Convex hulls of meshes: those of PhysX's GPU simulation, or those of its CPU simulation.

A mesh collides as convex hulls, which PhysX computes when the mesh is loaded. A process that may simulate on a GPU gets
simpler hulls, with at most 64 triangles each: the published golf ball has 34 corners there, and 93 elsewhere. RL4VLA
and RLinf trained and evaluated with these simpler hulls. Round bodies have flat faces then, and come to rest elsewhere.

One switch of the process decides for all its meshes. It needs no GPU, but it has to be set before anything of PhysX
exists, and it can not be taken back.
"""

import contextlib
from collections.abc import Iterator

import sapien
from sapien.pysapien import physx

HULLS = ("gpu", "cpu")


def choose(hulls: str) -> None:
    """Make this process compute hulls like PhysX's GPU simulation ("gpu") or like its CPU simulation ("cpu").

    Raises:
        ValueError: there are no such hulls, or this process has already computed the other ones.
    """
    if hulls not in HULLS:
        raise ValueError(f"unknown hulls {hulls!r}: use one of {', '.join(HULLS)}.")
    if physx.is_gpu_enabled() == (hulls == "gpu"):
        return
    other = "cpu" if hulls == "gpu" else "gpu"
    problem = ValueError(
        f"this process already simulates with hulls={other!r}, and PhysX can not change that, so make envs with "
        f"hulls={hulls!r} in another process, or in workers (num_env_workers)."
    )
    if hulls == "cpu":
        raise problem
    try:
        physx._enable_gpu()  # `sapien.physx.enable_gpu` also loads the library of the GPU simulation
    except RuntimeError as error:
        raise problem from error


@contextlib.contextmanager
def without_warning() -> Iterator[None]:
    """Make a CPU simulation where the switch is set. SAPIEN would warn of it, in every episode."""
    sapien.set_log_level("error")
    try:
        yield
    finally:
        sapien.set_log_level("warning")  # SAPIEN's default
