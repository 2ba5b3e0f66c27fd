"""Lets published bodies fall in a scene that SAPIEN alone makes: no ManiSkill, no code of `envs`.

    python tests/helpers/settle_by_hand.py FOLDER gpu|cpu < placements.json > poses.json

FOLDER holds the published assets. A placement is {"object": {"key", "density", "position", "quaternion"}, "receptacle":
{...}}. The answer has both poses [p, q] of each placement once they lie still, with the hulls of PhysX's GPU simulation
or of its CPU simulation, and the number of corners of each hull.
"""

import json
import sys
from pathlib import Path

import numpy as np
import sapien
from sapien.pysapien import physx

SUBSTEPS = 50, 600  # at 500 Hz. Those that still move after the first get the others, too


def build(scene: sapien.Scene, folder: Path, body: dict) -> sapien.Entity:
    builder = scene.create_actor_builder()
    material = physx.PhysxMaterial(1.0, 1.0, 0.0)
    path = folder / body["key"] / "collision.obj"
    builder.add_multiple_convex_collisions_from_file(str(path), material=material, density=body["density"])
    builder.initial_pose = sapien.Pose(body["position"], body["quaternion"])
    return builder.build()


def dynamics(entity: sapien.Entity) -> physx.PhysxRigidDynamicComponent:
    return entity.find_component_by_type(physx.PhysxRigidDynamicComponent)


def settle(assets: Path, placement: dict) -> dict:
    system = physx.PhysxCpuSystem()
    system.timestep = 1 / 500
    scene = sapien.Scene([system])
    stage = scene.create_actor_builder()
    stage.add_nonconvex_collision_from_file(
        str(assets / "tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb"),
        pose=sapien.Pose(q=[0.707, 0.707, 0, 0]),
    )
    stage.initial_pose = sapien.Pose([2.0634, 2.8313, 0.0])
    stage.build_static()
    folders = {"object": "more_carrot", "receptacle": "more_plate"}
    entities = {kind: build(scene, assets / "carrot" / folders[kind], placement[kind]) for kind in folders}
    for count in SUBSTEPS:
        for _ in range(count):
            system.step()
        bodies = [dynamics(entity) for entity in entities.values()]
        linear = sum(np.linalg.norm(body.linear_velocity) for body in bodies)
        angular = sum(np.linalg.norm(body.angular_velocity) for body in bodies)
        if linear <= 1e-3 and angular <= 1e-2:
            break
    poses = {kind: [*map(float, entity.pose.p), *map(float, entity.pose.q)] for kind, entity in entities.items()}
    corners = [len(shape.vertices) for shape in dynamics(entities["object"]).collision_shapes]
    return poses | {"corners": corners}


def main() -> None:
    assets, hulls = Path(sys.argv[1]), sys.argv[2]
    if hulls == "gpu":
        physx._enable_gpu()
    sapien.set_log_level("error")
    physx.set_default_material(0.3, 0.3, 0.0)
    physx.set_scene_config(
        gravity=[0, 0, -9.81],
        bounce_threshold=2.0,
        enable_pcm=True,
        enable_tgs=True,
        enable_ccd=False,
        enable_enhanced_determinism=True,
        enable_friction_every_iteration=True,
        cpu_workers=0,
    )
    physx.set_shape_config(contact_offset=0.02, rest_offset=0.0)
    physx.set_body_config(solver_position_iterations=15, solver_velocity_iterations=1, sleep_threshold=0.005)
    json.dump([settle(assets, placement) for placement in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
