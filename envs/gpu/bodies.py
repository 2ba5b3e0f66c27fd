"""States of bodies and contact forces between them, for the batch: in PhysX's buffers on a GPU, one by one on a CPU.

A batch on the CPU has one row. It serves tests, and `benchmarks/reference_step.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sapien
import torch
from mani_skill.envs.scene import ManiSkillScene
from mani_skill.utils.structs.actor import Actor
from mani_skill.utils.structs.link import Link

from envs.put_on_plate import impulses_from


class GpuBodies:
    """States of all bodies in PhysX's own buffer on the GPU."""

    def __init__(self, scene: ManiSkillScene, actors: list[Actor]):
        self.scene, self.actors = scene, actors
        self._index: torch.Tensor | None = None  # int64 [N, K], known once the GPU simulation has begun

    def _rows(self) -> torch.Tensor:
        """The row of each body in the buffer, int64 [N, K]."""
        if self._index is None:
            self._index = torch.stack([actor._body_data_index for actor in self.actors], dim=1).long()
        return self._index

    def read(self) -> torch.Tensor:
        """States as of the last fetch, float32 [N, K, 13]: p, q (wxyz), linear and angular velocity."""
        return self.scene.px.cuda_rigid_body_data.torch()[self._rows()]

    def write(self, where: torch.Tensor, states: torch.Tensor) -> None:
        """Write states [R, K, 13] of the rows `where` into the buffer. They take effect once they are applied."""
        self.scene.px.cuda_rigid_body_data.torch()[self._rows()[where]] = states


class CpuBodies:
    """`GpuBodies` of one row on the CPU, where every body is an object of its own."""

    def __init__(self, scene: ManiSkillScene, actors: list[Actor]):
        self.actors = actors
        self._entities = [actor._objs[0] for actor in actors]
        self._bodies = [
            entity.find_component_by_type(sapien.physx.PhysxRigidDynamicComponent) for entity in self._entities
        ]

    def read(self) -> torch.Tensor:
        rows = [
            [*entity.pose.p, *entity.pose.q, *body.linear_velocity, *body.angular_velocity]
            for entity, body in zip(self._entities, self._bodies)
        ]
        return torch.tensor(np.array(rows, np.float32))[None]

    def write(self, where: torch.Tensor, states: torch.Tensor) -> None:
        if not len(where):
            return
        for entity, body, state in zip(self._entities, self._bodies, states[0].numpy()):
            entity.pose = sapien.Pose(state[:3], state[3:7])
            body.linear_velocity = state[7:10]
            body.angular_velocity = state[10:]
            body.wake_up()


class GpuForces:
    """Contact forces between pairs of bodies. PhysX sums them on the GPU for all pairs that an episode may need."""

    def __init__(self, scene: ManiSkillScene, fingers: tuple[Link, Link], actors: list[Actor], num_objects: int):
        """actors: all bodies, `num_objects` objects first."""
        self._px, self._num_envs = scene.px, scene.num_envs
        self._first_receptacle = num_objects
        objects, receptacles = actors[:num_objects], actors[num_objects:]
        self._on_fingers = self._query(fingers, objects)
        self._on_receptacles = self._query(receptacles, objects)

    def _query(self, touched: Sequence[Actor | Link], objects: list[Actor]) -> tuple:
        """A query of the contacts between two sets of bodies, and the shape [touched, objects, N, 3] of its answer."""
        pairs = [pair for body in touched for obj in objects for pair in zip(body._bodies, obj._bodies)]
        query = self._px.gpu_create_contact_pair_impulse_query(pairs)
        return query, (len(touched), len(objects), self._num_envs, 3)

    def _forces(self, query_and_shape: tuple) -> torch.Tensor:
        """The forces (N) of a query in its shape."""
        query, shape = query_and_shape
        self._px.gpu_query_contact_pair_impulses(query)
        return query.cuda_impulses.torch().reshape(shape) / self._px.timestep

    def read(self, row: torch.Tensor, obj: torch.Tensor, receptacle: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Forces (N) of the last substep, [N, 3] each: of the object on left finger, right finger and receptacle.

        row, obj, receptacle: int64 [N], each row with the indices of its object and receptacle.
        """
        on_left, on_right = self._forces(self._on_fingers)[:, obj, row]
        on_receptacles = self._forces(self._on_receptacles)
        return on_left, on_right, on_receptacles[receptacle - self._first_receptacle, obj, row]


class CpuForces:
    """`GpuForces` of one row on the CPU, from the list of all contacts."""

    def __init__(self, scene: ManiSkillScene, fingers: tuple[Link, Link], actors: list[Actor], num_objects: int):
        self._px = scene.px
        self._fingers = [finger._objs[0].entity for finger in fingers]
        self._entities = [actor._objs[0] for actor in actors]

    def read(self, row: torch.Tensor, obj: torch.Tensor, receptacle: torch.Tensor) -> tuple[torch.Tensor, ...]:
        touched = (*self._fingers, self._entities[int(receptacle[0])])
        impulses = impulses_from(self._entities[int(obj[0])], touched, self._px.get_contacts())
        return tuple(torch.from_numpy(impulses[body] / self._px.timestep)[None].float() for body in touched)
