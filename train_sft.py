"""Supervised fine-tuning on demonstrations: makes the warm-up policy that PPO and GRPO start from.

    # demonstrations first
    python collect_demos.py --config yaml/demos_tiny.yaml --output demos/tiny
    # one process ("rank") per GPU
    deepspeed train_sft.py --config yaml/sft_warmup_openvlaoft.yaml --demos demos/main
    # two ranks on a CPU
    export DS_ACCELERATOR=cpu
    deepspeed --num_gpus 2 train_sft.py --config yaml/sft_tiny_openvlaoft.yaml
    # every flag
    python train_sft.py --help

An update is one optimizer step on `batch_size` decisions. An iteration is `updates_per_iteration` updates and one line
of metrics. The seed and the number of the update decide which decisions are read, in which order, and how their images
are augmented. So any number of ranks trains on the same batches.

    B decisions in a micro batch   C = chunk_size actions per decision   D = 7 tokens per action
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

if __name__ == "__main__" and os.environ.get("LOCAL_RANK", "0") == "0":
    print("train_sft.py starts: loading packages takes about 10 s", file=sys.stderr, flush=True)

import torch

from envs import check_envs, control_mode, episode_facts, eval_episode_ids, every_instruction, make_envs
from envs.demo_sets import image_file, open_demos
from envs.demonstrations import Demos
from schemas import UserError, flags
from schemas.pixels import Pixels
from vla.backends import check_backends
from vla.cli import flag_value, parse_args, pick
from vla.distributed import print0, rank, run_main, setup_distributed, user_errors, world_size
from vla.evaluation.episodes import evaluate, mean_statistics
from vla.evaluation.model_card import export_folder, export_policy
from vla.evaluation.publish import check_push, push_policy
from vla.evaluation.recording import Recorder
from vla.logger import OF_LABELS, Averages, Logger, describe_run, due
from vla.models.about import world_of
from vla.models.loading import load_policy
from vla.models.policy import PolicyInputs, VLAPolicy, moved, sample_bins, uniform_noise
from vla.start.checks import check_iterations_left, check_scene_memory, fetch_weights, prompt_room, what_applies
from vla.start.launch import launched
from vla.text import counted
from vla.training import augmentation
from vla.training.checkpoint import begin_run, load_checkpoint, open_run, save_checkpoint
from vla.training.engine import DTYPES, NonFiniteGuard, backward, build_engine, read_deepspeed_config, zero_stage
from vla.training.passes import batch_indices, check_sizes, learning_rate_at
from vla.training.preemption import Preemption
from vla.training.small_images import SmallImages, read_ahead
from vla.training.stages import StageSwitcher, make_rollout_copy, rollout_stage, update_stage, whole_state_dict

MAX_CLIPPED = 0.1  # largest share of labels that the statistics may clip in a dimension

# evaluation runs every episode once, to its end
ONE_PER_ID = dict(auto_reset=False, ignore_terminations=False, pipeline_stages=1, first_env=0, privileged=False)


@dataclass
class Args:
    # ---- most used
    config: tuple[flags.Text, ...] = ()
    """Yaml files of flags. A later file wins over an earlier one, and the command line wins over all."""
    resume: flags.Text | None = None
    """Run folder to continue. Its own flags apply first, then those of --config, then those on the command line."""
    run_dir: flags.Text | None = None
    """New folder for everything that the run writes. Without it, runs/<algorithm>_<env_id>_<time> is made."""
    seed: flags.Seed = 0
    """Seed of everything random. Two runs with one seed on one machine's CPUs are identical."""
    num_updates: flags.Count = 2000
    """Optimizer steps of the run."""
    demos: flags.Text = "demos"
    """Folder that collect_demos.py made, trajectories that ManiSkill recorded (a folder or the .h5 file), or a data set
    in LeRobot's format (version 3). Its action statistics have the name of its env_id, or of a LeRobot set's folder."""
    model_path: flags.Text = "openvla-tiny"
    """Model folder in the published layout, a model on the Hugging Face Hub (name or name@revision), or random weights:
    openvla-tiny or openvla-oft-tiny."""
    batch_size: flags.Count = 32
    """Decisions per optimizer step, over all ranks."""
    learning_rate: flags.NonNegative = 5e-4
    """Learning rate of the policy."""
    micro_batch_size: flags.Count = 8
    """Decisions per forward pass and GPU. Halve it when memory runs out. It does not change what is learned."""

    # ---- run
    updates_per_iteration: flags.Count = 50
    """Optimizer steps per iteration. Each iteration writes one line of metrics."""
    save_freq: flags.CountOrNone = 40
    """Iterations between two checkpoints. The last iteration is always saved, and 0 saves only that one."""
    keep_checkpoints: flags.CountOrNone = 2
    """Number of newest checkpoints that stay on disk. 0 keeps all."""
    eval_freq: flags.CountOrNone = 10
    """Iterations between two evaluations. The start and the end are always evaluated, and 0 evaluates only there."""
    logger_backends: tuple[Literal["tensorboard", "wandb", "swanlab"], ...] = ("tensorboard",)
    """Loggers that get the metrics besides metrics.jsonl. You install wandb and swanlab yourself."""
    project_name: flags.Name = "solovla"
    """Project at wandb and swanlab."""
    experiment_name: flags.Name | None = None
    """Name of the run at wandb and swanlab. Without it, the run folder's name is used."""
    push_to_hub: flags.Text | None = None
    """Model on the Hugging Face Hub, such as your-name/my-policy, that gets the final policy and its card after the
    run. A new one is private."""
    demos_camera: flags.Text | None = None
    """Camera of a LeRobot set, such as observation.images.top. Without it, the set's only camera is used."""
    export_dir: flags.Text | None = None
    """Folder for the final policy and its model card, with an adapter merged in. Without it, export/ in the run folder
    is used. A folder that you name on the command line may hold an older policy, which is replaced."""

    # ---- model
    model_type: Literal["openvla", "openvla_oft"] = "openvla"
    """Model family: openvla (writes the 7 tokens of one action one by one) or openvla_oft (predicts a chunk of actions
    in one pass). A folder that SoloVLA wrote knows it."""
    unnorm_key: flags.Text = "bridge_orig"
    """Name of the checkpoint's action statistics, which turn tokens into metres and radians."""
    image_resize: Literal["tensor", "pil"] = "tensor"
    """How camera images are resized: tensor as in RLinf, pil as in OpenVLA."""
    oft_stop_token: bool = False
    """End the sequence of openvla_oft in </s>, as moojink's discrete checkpoints need. Those of RLinf do not."""
    lora_path: flags.Text | None = None
    """LoRA adapter to load, a folder or a name on the Hub. It keeps its own rank, alpha and layers."""
    merge_lora: bool = False
    """Merge the adapter of --lora_path into the weights, and train a fresh adapter on top."""
    lora_rank: flags.LoraRank = 32
    """Rank of a fresh LoRA adapter. 0 trains the weights themselves."""
    lora_alpha: flags.LoraAlpha = 32
    """Numerator of a fresh adapter's scale, lora_alpha / lora_rank. RLinf uses 32, RL4VLA 16."""
    lora_scope: Literal["all", "llm"] = "all"
    """What is trained, by an adapter or (with rank 0) whole: every linear layer as in RLinf (all), or only the language
    model (llm). With llm, the frozen vision towers see each image once per rollout."""
    max_prompt_length: flags.PromptLength = 30
    """Tokens that prompts are padded to. A task with a longer prompt raises it."""
    chunk_size: flags.Chunk = 1
    """Actions per decision: 1 for openvla, 8 for the published openvla_oft models."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of weights and activations. Master weights and optimizer moments are always float32."""

    # ---- env
    env_id: flags.EnvId = "PutOnPlateInScene25Main-v3"
    """Env: one of the 17 PutOnPlateInScene25 ids, or any ManiSkill id with the control mode pd_ee_delta_pose."""
    instruction: flags.Text | None = None
    """Instruction for the policy in an env outside the PutOnPlateInScene25 family."""
    reward_mode: Literal["sparse", "dense", "normalized_dense"] | None = None
    """ManiSkill's reward in an env outside the PutOnPlateInScene25 family. Without it, such an env pays 1 when the task
    becomes solved and -1 when it is undone."""
    obj_set: Literal["train", "test", "all"] = "train"
    """Objects, tables and receptacles of the episodes: those of training, the unseen ones (test), or both (all)."""
    asset_pack: Literal["builtin", "bridge"] = "builtin"
    """Meshes and textures: made by code (builtin), or the published meshes and photographs (bridge)."""
    asset_dir: flags.Text | None = None
    """Folder of the published assets, or the data set RLinf/maniskill_assets, which is fetched from the Hub. Without
    it, they are in ManiSkill's folder (`python doctor.py --download`)."""
    protocol: Literal["rl4vla", "rlinf"] = "rl4vla"
    """Rules of the scene: those of RL4VLA, or RLinf's version of them to compare with RLinf's published table."""
    hulls: Literal["gpu", "cpu"] = "gpu"
    """Convex hulls of the published meshes: those of PhysX's GPU simulation, as in published results, or of its CPU
    simulation. They decide how bodies roll and lie. The builtin pack has no meshes."""
    image_size: tuple[flags.Pixels, flags.Pixels] = (640, 480)
    """Width and height of the camera image in pixels. The camera's pose and field of view stay the same."""
    sim_freq: flags.Hertz = 500
    """Physics steps per second, a multiple of 5. Control runs at 5 Hz. Results at different rates do not compare."""
    sim_backend: Literal["physx_cpu", "physx_cuda", "auto"] = "physx_cpu"
    """Simulator: physx_cpu repeats bit for bit. physx_cuda, one batch per rank on the GPU, is experimental: it was not
    run on a GPU yet. auto is physx_cuda where there is a GPU."""
    render_backend: Literal["cpu", "cuda", "auto"] = "auto"
    """Device that renders images for physx_cpu: cpu, cuda, or auto (the GPU if SAPIEN can render on it)."""
    max_episode_steps: flags.EpisodeSteps = 80
    """Time limit of an episode in actions."""
    num_env_workers: flags.Processes = 0
    """Worker processes per rank that simulate the envs. 0 simulates in the rank's own process."""
    worker_timeout: flags.Positive = 300.0
    """Seconds without an answer after which a worker is replaced. Without workers, the run ends instead."""
    eval_temperature: flags.NonNegative = 0.6
    """Sampling temperature in evaluation. 0 is greedy. Published tables use 0.6."""
    num_eval_episodes: flags.Episodes = 64
    """Held-out episodes per evaluation, the same ones every time."""
    num_eval_envs: flags.Envs = 16
    """Envs that evaluation runs at once, over all ranks."""
    video_episodes: flags.CountOrNone = 8
    """Held-out episodes of every evaluation that become videos, the same ones every time. 0 records nothing."""
    video_size: tuple[flags.Pixels, flags.Pixels] = (480, 360)
    """Width and height of the videos' images. What the policy saw is inset, unless it is at least that large."""

    # ---- algorithm
    label_sigma: flags.NonNegative = 0.0
    """Standard deviation in bins of the Gaussian that spreads a target token over its neighbours. The gripper and
    dimensions that never move keep exact targets. The model openvla then reads tokens drawn from the spread targets,
    because exact ones would give the gripper away. 0 switches both off."""
    image_aug: bool = True
    """Augment images with random crops and colours."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the policy's learning rate. It falls to 0 at the end with linear and cosine."""
    warmup_updates: flags.CountOrNone = 0
    """Optimizer steps over which the learning rate rises to --learning_rate."""
    weight_decay: flags.NonNegative = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: flags.NonNegative = 10.0
    """Largest gradient norm. Larger gradients are scaled down to it. 0 sets no limit."""

    # ---- system
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. It saves memory and takes a third more time."""
    deepspeed_config: flags.Text = "ds_configs/zero3.json"
    """DeepSpeed file with the ZeRO settings. It holds no batch sizes and no learning rates."""
    offload: Literal["none", "stage"] = "none"
    """What leaves the GPU's memory: nothing, or with stage whatever only the other half of an iteration needs."""
    local_rank: flags.LocalRank = -1
    """Number of this rank on its machine. The launcher sets it."""


class Part(NamedTuple):
    """One rank's micro batch, before anything was read. The seed and the number of the update decide all of it."""

    update: int
    index: torch.Tensor  # int64 [B], samples
    draws: torch.Tensor | None  # [B, 6], random numbers for augment(). None leaves the images as they are
    noise: torch.Tensor  # uniform [B, C, D], which decides the context tokens if label_sigma is above 0
    total_weight: float  # of the whole update, divided by the number of ranks
    last: bool  # whether it is the last one of its update


class CloneBatch(NamedTuple):
    """Input of one forward pass."""

    inputs: PolicyInputs  # [B, ...]
    tokens: torch.Tensor  # int64 [B, C, D], the labels as tokens
    context_tokens: torch.Tensor  # int64 [B, C, D], read by the model as its own earlier tokens
    labels: torch.Tensor  # fp32 [B, C, D], the labels normalised to [-1, 1]
    weights: torch.Tensor  # [B, C], 0 after the end of an episode

    def to(self, device: torch.device) -> "CloneBatch":
        return CloneBatch(self.inputs.to(device), *(moved(field, device) for field in self[1:]))


def clone_loss(
    losses: torch.Tensor, predicted: torch.Tensor, batch: CloneBatch, decoded: torch.Tensor, total_weight: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean cross entropy of the tokens, and the distance of greedy actions from the labels.

    Args:
        losses, predicted: [B, C, D], of VLAPolicy.clone(). decoded: [B, C, D], `predicted` normalised to [-1, 1].
        total_weight: sum of the weights of the whole batch, divided by the number of ranks. The losses of the micro
            batches then sum to the mean of the batch, after the average over ranks.
    """

    def mean(x: torch.Tensor) -> torch.Tensor:  # [B, C, D]
        return (x.mean(dim=-1) * batch.weights).sum() / total_weight

    loss = mean(losses)
    metrics = {
        "train/loss": loss.detach(),
        "train/token_accuracy": mean((predicted == batch.tokens).float()),
        "train/action_l1": mean((decoded - batch.labels).abs()),
    }
    return loss, metrics


def check_labels(policy: VLAPolicy, demos: Demos, unnorm_key: str) -> None:
    """Raise ValueError if the statistics of the policy clip too many actions of the demonstrations."""
    labels, tokens = torch.from_numpy(demos.labels).double(), policy.action_tokens
    span = 0.05 * (tokens.q99 - tokens.q01)  # the quantiles themselves leave out 1 % on either side
    outside = ((labels < tokens.q01 - span) | (labels > tokens.q99 + span)) & tokens.mask  # [M, 7]
    share, axis = outside.double().mean(dim=0).max(dim=0)
    if share > MAX_CLIPPED:
        raise ValueError(
            f"{share:.0%} of the demonstrations' actions are out of range in dimension {int(axis)} of --unnorm_key "
            f"{unnorm_key}: use the statistics of the demonstrations ({', '.join(demos.statistics)}), or smaller steps"
        )


def parts_of(
    update: int,
    demos: Demos,
    mine: slice,
    *,
    batch_size: int,
    micro_batch_size: int,
    chunk_size: int,
    seed: int,
    image_aug: bool,
) -> list[Part]:
    """The micro batches of an update. mine: this rank's part of the batch."""
    index = batch_indices(update, len(demos), batch_size, seed)
    generator = torch.Generator().manual_seed(seed + 7919 * update)
    draws = augmentation.draw(batch_size, generator)
    noise = uniform_noise(batch_size, chunk_size, generator)
    total = float(demos.chunks(index, chunk_size)[1].sum()) / world_size()
    parts = list(zip(*(whole[mine].split(micro_batch_size) for whole in (index, draws, noise))))
    return [
        Part(update, part, part_draws if image_aug else None, part_noise, total, number == len(parts))
        for number, (part, part_draws, part_noise) in enumerate(parts, 1)
    ]


def read_batch(
    demos: Demos,
    images_of: Callable[[list[int]], torch.Tensor],
    policy: VLAPolicy,
    index: torch.Tensor,
    draws: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    label_sigma: float = 0.0,
) -> CloneBatch:
    """Read samples of the demonstrations, on the CPU.

    Args:
        images_of: images at the model's size, uint8 [B, h, w, 3], for B samples.
        index, draws, noise: see Part. label_sigma: see Args.
    """
    images = images_of(index.tolist())
    if draws is not None:
        images = augmentation.augment(images, draws)
    inputs = PolicyInputs(images, *policy.collate([policy.prompt_ids(demos.instructions[i]) for i in index]))
    labels, valid = (torch.from_numpy(part) for part in demos.chunks(index, policy.chunk_size))
    labels = policy.action_tokens.normalize(labels)
    tokens = policy.action_tokens.encode(labels)
    context_tokens = tokens
    if label_sigma:
        spread = policy.action_tokens.soft_targets(tokens, label_sigma).log()
        context_tokens = sample_bins(spread, noise, greedy=False) + policy.action_tokens.first_id
    return CloneBatch(inputs, tokens, context_tokens, labels.float(), valid.float())


def main(args: Args) -> None:
    # ------------------------------------------------------------------ set-up: wrong input ends here
    with user_errors():
        launch = launched()
        check_sizes(**pick(args, check_sizes, world_size=launch.world_size))
        check_backends(args.logger_backends)
        check_push(args.push_to_hub)
        ds_config = read_deepspeed_config(args.deepspeed_config, args.dtype, args.offload)
        demos = open_demos(Path(args.demos), args.demos_camera, args.env_id, args.instruction)
        demos.check_world(**pick(args, demos.check_world))
        if len(demos) < args.batch_size:
            raise UserError(f"--demos {args.demos} has only {len(demos)} steps: lower --batch_size {args.batch_size}")
        num_eval_envs = max(1, args.num_eval_envs // launch.world_size)
        workers = min(args.num_env_workers, num_eval_envs)
        eval_world = pick(args, make_envs, num_env_workers=workers, **ONE_PER_ID)
        check_envs(args.env_id, num_eval_envs, **eval_world)
        eval_ids = eval_episode_ids(args.env_id, args.obj_set, args.num_eval_episodes)
        texts = every_instruction(args.env_id, args.obj_set, args.instruction) | set(demos.instructions)
        args.max_prompt_length = prompt_room(args.model_path, texts, args.max_prompt_length)
        check_scene_memory(
            launch.ranks_here * num_eval_envs,
            launch.ranks_here * workers,
            args.image_size,
            "--num_eval_envs, --num_env_workers and --image_size",
        )
        fetch_weights("--model_path", args.model_path, args.lora_path)
        device = setup_distributed(args.seed)
        default_dir = f"runs/sft_{args.env_id.replace(':', '.')}_{time.strftime('%Y%m%d_%H%M%S')}"
        run_dir, checkpoint = open_run(args.run_dir, args.resume, default_dir, asdict(args))
        export_dir = export_folder(run_dir, args.export_dir, flag_value(sys.argv[1:], "export_dir") is not None)
        num_iterations = args.num_updates // args.updates_per_iteration
        check_iterations_left(checkpoint, num_iterations, "--num_updates")
        in_words = (
            f"{counted(launch.world_size, 'rank')}, {args.batch_size} of {len(demos)} demonstrated decisions per "
            f"optimizer step, {counted(args.num_updates, 'step')}, evaluation in {counted(num_eval_envs, 'env')} and "
            f"{counted(workers, 'worker')} per rank"
        )
        print0(what_applies(**pick(args, what_applies, sizes=in_words)))
        model_flags = dict(norm_stats=demos.statistics, value_head=False, dtype=DTYPES[args.dtype], device=device)
        world_now = world_of(**pick(args, world_of, control=control_mode(args.env_id)))
        model_flags |= dict(cuda_graphs=True, world=world_now)
        policy = load_policy(args.model_path, args.model_type, **pick(args, load_policy, **model_flags))
        check_labels(policy, demos, args.unnorm_key)
        eval_envs = make_envs(args.env_id, num_eval_envs, pixels=policy.pixels, **eval_world)

    rollout_copy = make_rollout_copy(policy, zero_stage(ds_config), args.offload)
    engine = build_engine(policy, ds_config, **pick(args, build_engine, value_learning_rate=None))
    stages = StageSwitcher(engine, rollout_copy, args.offload)
    guard = NonFiniteGuard(run_dir, rank())
    schedule, batch_flags = pick(args, learning_rate_at), pick(args, parts_of)
    local_batch_size = args.batch_size // world_size()
    mine = slice(rank() * local_batch_size, (rank() + 1) * local_batch_size)
    pixels = Pixels(policy.image_size, args.image_resize)
    images = SmallImages(demos.images, len(demos), pixels, image_file(demos, repr(pixels), torch.__version__))

    def read(part: Part) -> CloneBatch:
        return read_batch(demos, images, policy, part.index, part.draws, part.noise, args.label_sigma)

    start_iteration, num_seen = 0, 0  # num_seen: decisions trained on, over all ranks
    with user_errors():
        if checkpoint:
            start_iteration, num_seen, _ = load_checkpoint(engine, checkpoint, slice(0), 0)
        begin_run(run_dir, checkpoint)
        logger = Logger(
            run_dir,
            rank() == 0,
            num_iterations,
            start_iteration,
            num_seen,
            args.logger_backends,
            "decisions",
            OF_LABELS,
            **pick(args, Logger),
        )
        sizes = {"num_iterations": num_iterations, "local_batch_size": local_batch_size, "num_samples": len(demos)}
        preemption = Preemption(engine, run_dir, args.keep_checkpoints, say=logger.close)
        open_envs = partial(make_envs, args.env_id, beside=eval_envs, **eval_world)
        facts = episode_facts(args.env_id, args.obj_set, eval_ids, args.instruction)
        recorder = Recorder(run_dir, eval_envs, open_envs, facts, preemption, **pick(args, Recorder))
        logger.describe(describe_run(asdict(args), sizes, world_size(), asdict(Args())))

    def run_evaluation(iteration: int) -> bool:
        """Run the held-out episodes, and record a few of them. False if the run was asked to end."""
        with logger.timer("eval"):
            watch = recorder.watch()
            with rollout_stage(stages) as actor:
                episodes = evaluate(actor, eval_envs, eval_ids, args.eval_temperature, watch, preemption)
            if episodes is not None:
                recorder.keep(iteration, episodes)
                logger.write_evaluation(iteration, num_seen, mean_statistics(episodes))
                recorder.record(iteration, episodes, watch)
                logger.show_videos(iteration, num_seen)
        return episodes is not None

    with logger.timer("eval"):
        recorder.catch_up(start_iteration)  # the videos that a stopped run still owes
    if logger.owes_evaluation(args.eval_freq) and not run_evaluation(start_iteration):
        preemption.exit(checkpoint or save_checkpoint(engine, run_dir, 0, 0, [], args.keep_checkpoints))

    for iteration in range(start_iteration, num_iterations):
        preemption.snapshot(iteration, num_seen, [])
        preemption.exit_if_requested()  # in an update that could not be undone
        # ------------------------------------------------------------------ update: ranks in lock-step
        averages = Averages()
        with logger.timer("update"), update_stage(stages):
            updates = range(iteration * args.updates_per_iteration, (iteration + 1) * args.updates_per_iteration)
            parts = (part for update in updates for part in parts_of(update, demos, mine, **batch_flags))
            for part, batch in read_ahead(read, parts):
                rate = learning_rate_at(part.update, **schedule)
                engine.optimizer.param_groups[0]["lr"] = rate
                batch = batch.to(device)
                losses, predicted = engine("clone", batch.inputs, batch.tokens, args.label_sigma, batch.context_tokens)
                decoded = policy.action_tokens.decode(predicted).float().to(device)
                loss, metrics = clone_loss(losses, predicted, batch, decoded, part.total_weight)
                guard.check_gradients(backward(engine, loss, part.last), batch, loss)
                averages.add(metrics)
                if part.last:
                    preemption.exit_if_requested()
        num_seen += args.updates_per_iteration * args.batch_size

        # ------------------------------------------------------------------ log, evaluate, save
        stopped = due(iteration, args.eval_freq, num_iterations) and not run_evaluation(iteration + 1)
        metrics = averages.reduce(count=args.updates_per_iteration) | guard.pop_metrics() | stages.pop_metrics()
        metrics["train/actor/lr"] = rate
        note = f"update {(iteration + 1) * args.updates_per_iteration} of {args.num_updates}"
        logger.write(iteration + 1, num_seen, metrics, [], 0, note)
        if stopped or due(iteration, args.save_freq, num_iterations):
            saved = save_checkpoint(engine, run_dir, iteration + 1, num_seen, [], args.keep_checkpoints)
            if stopped:  # --resume repeats the evaluation
                preemption.exit(saved)

    export_policy(engine.module, whole_state_dict(engine, keep=rank() == 0), run_dir, export_dir)
    for opened in (logger, eval_envs):
        opened.close()
    push_policy(args.push_to_hub, run_dir, export_dir)


if __name__ == "__main__":
    run_main(main, lambda: parse_args(Args, sys.argv[1:], __doc__))
