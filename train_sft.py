"""Behaviour cloning of demonstrations: makes the warm-up policy that PPO and GRPO start from.

    python collect_demos.py --config yaml/demos_tiny.yaml --output demos/tiny
    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 train_sft.py --config yaml/sft_tiny_openvlaoft.yaml
    deepspeed train_sft.py --config yaml/sft_warmup_openvlaoft.yaml --demos demos/main
    python train_sft.py --help                                                        # every flag

An update is one optimizer step on `batch_size` decisions; an iteration is `updates_per_iteration` of them, one line of
metrics. Which decisions, in which order, and how their pictures are augmented is a function of the seed and the update,
on any number of ranks.

    B decisions in a micro batch   C = chunk_size actions per decision   D = 7 tokens per action
"""

import sys
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from envs import check_envs, eval_episode_ids, every_instruction, make_envs
from envs.demonstrations import Demos
from envs.video import VideoWriter
from schemas import UserError
from schemas.flags import (
    Chunk,
    Count,
    CountOrNone,
    EnvId,
    Envs,
    Episodes,
    EpisodeSteps,
    Hertz,
    LocalRank,
    LoraAlpha,
    LoraRank,
    Name,
    NonNegative,
    Pixels,
    Positive,
    Processes,
    PromptLength,
    Seed,
    Text,
)
from vla.cli import flag_value, parse_args, pick
from vla.distributed import print0, rank, run_main, setup_distributed, user_errors, world_size
from vla.evaluation.episodes import evaluate
from vla.evaluation.model_card import export_folder, export_policy
from vla.logger import Averages, Logger, check_backends, describe_run, due
from vla.models.loading import load_policy
from vla.models.policy import PolicyInputs, VLAPolicy, sample_bins, uniform_noise
from vla.start.checks import check_iterations_left, check_scene_memory, prompt_room, what_applies
from vla.start.launch import launched
from vla.training import augmentation
from vla.training.checkpoint import begin_run, load_checkpoint, open_run, save_checkpoint
from vla.training.engine import (
    DTYPES,
    NonFiniteGuard,
    backward,
    build_engine,
    decay_at,
    read_deepspeed_config,
    zero_stage,
)
from vla.training.preemption import Preemption
from vla.training.stages import StageSwitcher, make_rollout_copy, rollout_stage, update_stage, whole_state_dict

MAX_CLIPPED = 0.1  # share of a dimension's labels that the statistics may cut off

# evaluation runs every episode once, to its end
ONE_PER_ID = dict(auto_reset=False, ignore_terminations=False, pipeline_stages=1, first_env=0, privileged=False)


@dataclass
class Args:
    # ---- run
    config: tuple[Text, ...] = ()  # yaml files of flags, the later wins; flags on the command line win over all
    run_dir: Text | None = None  # where everything goes; a new folder (default: runs/<algorithm>_<env_id>_<time>)
    resume: Text | None = None  # run folder to go on with: its own flags, then --config's, then those typed here
    seed: Seed = 0  # everything random is a function of it; two runs with one seed on one machine's CPUs are identical
    num_updates: Count = 2000  # optimizer steps
    updates_per_iteration: Count = 50  # optimizer steps per iteration: one line of metrics
    save_freq: CountOrNone = 40  # checkpoint every so many iterations, and at the end
    keep_checkpoints: CountOrNone = 2  # how many checkpoints stay on disk; 0 keeps all
    eval_freq: CountOrNone = 10  # evaluate every so many iterations, besides the start and the end; 0 = only these two
    # where metrics go besides metrics.jsonl; wandb and swanlab have to be installed by you
    logger_backends: tuple[Literal["tensorboard", "wandb", "swanlab"], ...] = ("tensorboard",)
    project_name: Name = "solovla"  # of the project at wandb and swanlab
    experiment_name: Name | None = None  # of the run at wandb and swanlab (default: the run folder's name)
    # folder for the final policy with a card, an adapter merged in (default: export/ in the run folder); given on the
    # command line, it replaces an older policy
    export_dir: Text | None = None

    # ---- model
    model_path: Text = "openvla-tiny"  # folder in the published layout, or openvla-tiny, openvla-oft-tiny (random)
    # openvla: one action per decision, its 7 tokens written one by one; openvla_oft: chunk_size actions in one pass
    model_type: Literal["openvla", "openvla_oft"] = "openvla"
    unnorm_key: Text = "bridge_orig"  # which of the checkpoint's statistics turn tokens into metres and radians
    image_resize: Literal["tensor", "pil"] = "tensor"  # pictures are resized as in RLinf, or as in OpenVLA
    oft_stop_token: bool = False  # openvla_oft: end in </s>, as moojink's discrete checkpoints; RLinf's do not
    lora_path: Text | None = None  # folder of an adapter to continue; it keeps its own rank, alpha and layers
    merge_lora: bool = False  # add lora_path's adapter into the weights, and train a fresh one on top
    lora_rank: LoraRank = 32  # rank of a fresh adapter; 0 trains the weights themselves
    lora_alpha: LoraAlpha = 32  # scale of a fresh adapter is lora_alpha / lora_rank (RLinf: 32; RL4VLA: 16)
    # what an adapter trains, or rank 0 whole. all: every linear layer (RLinf); llm: the language model's alone,
    # and pictures pass the frozen towers once per rollout
    lora_scope: Literal["all", "llm"] = "all"
    max_prompt_length: PromptLength = 30  # prompts are padded to this many tokens, or to the longest one's
    chunk_size: Chunk = 1  # actions per decision; openvla has 1, openvla_oft's published models have 8
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of weights and activations; master weights, moments are fp32

    # ---- demonstrations, and the env that they are from
    demos: Text = "demos"  # folder that collect_demos.py made; its statistics are known by the name of its env_id
    env_id: EnvId = "PutOnPlateInScene25Main-v3"  # one of the family's 17, or any ManiSkill id with pd_ee_delta_pose
    instruction: Text | None = None  # what the policy is told in an env that is not of the family
    obj_set: Literal["train", "test", "all"] = "train"  # which objects, tables and receptacles episodes are drawn from
    asset_pack: Literal["builtin", "bridge"] = "builtin"  # made by code, or the published meshes and photographs
    asset_dir: Text | None = None  # where the published assets are (`python doctor.py --download`)
    protocol: Literal["rl4vla", "rlinf"] = "rl4vla"  # RL4VLA's scene, or RLinf's departures, to compare with its table
    image_size: tuple[Pixels, Pixels] = (640, 480)  # camera width and height; pose and field of view stay
    sim_freq: Hertz = 500  # physics steps per second, control is at 5 Hz; results at different rates do not compare
    # physx_cpu repeats bit for bit; physx_cuda: all envs of a rank in one batch; auto: the GPU where there is one
    sim_backend: Literal["physx_cpu", "physx_cuda", "auto"] = "physx_cpu"
    # who draws what physx_cpu simulates; auto: the GPU where SAPIEN can draw on it
    render_backend: Literal["cpu", "cuda", "auto"] = "auto"
    max_episode_steps: EpisodeSteps = 80  # an episode is cut after this many actions
    num_env_workers: Processes = 0  # worker processes per rank that simulate; 0 = in the rank's own process
    # seconds after which a worker that gives no answer is replaced; simulating in the rank's own process, the run ends
    worker_timeout: Positive = 300.0
    eval_temperature: NonNegative = 0.6  # of sampling in evaluation; 0 = greedy (published tables use 0.6)
    num_eval_episodes: Episodes = 64  # held-out episodes per evaluation, the same ones every time
    num_eval_envs: Envs = 16  # envs that evaluation runs at once, over all ranks

    # ---- algorithm
    batch_size: Count = 32  # decisions per optimizer step, over all ranks
    # a target token is spread over its neighbours by a Gaussian of so many bins (not the gripper's, nor what never
    # moves), and openvla is told that it wrote one of them: told the exact one, it reads the gripper off it and fails
    # on tokens of its own; 0 = neither
    label_sigma: NonNegative = 0.0
    image_aug: bool = True  # random crops and colours
    learning_rate: NonNegative = 5e-4  # of the policy
    # of the learning rate; linear and cosine fall to 0 at the end
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_updates: CountOrNone = 0  # over so many updates the learning rate rises to learning_rate
    weight_decay: NonNegative = 0.01  # of AdamW
    max_grad_norm: NonNegative = 10.0  # gradients are scaled down to this norm; 0 leaves them as they are

    # ---- system
    micro_batch_size: Count = 8  # decisions per forward and GPU: the memory knob. Out of memory: halve it
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    deepspeed_config: Text = "ds_configs/zero3.json"  # ZeRO settings; sizes and rates are not in it
    offload: Literal["none", "stage"] = "none"  # stage: what only the other half of an iteration needs leaves the GPU
    local_rank: LocalRank = -1  # set by the launcher


class CloneBatch(NamedTuple):
    """What one forward reads, on the model's device."""

    inputs: PolicyInputs  # [B, ...]
    tokens: torch.Tensor  # int64 [B, C, D]: the labels as tokens
    context_tokens: torch.Tensor  # int64 [B, C, D], what the model reads as its own earlier tokens
    labels: torch.Tensor  # fp32 [B, C, D]: the labels, normalised to [-1, 1]
    weights: torch.Tensor  # [B, C]: 0 past the end of an episode


def learning_rate_at(
    update: int, *, num_updates: int, learning_rate: float, schedule: str, warmup_updates: int
) -> float:
    """The rate of update 0 .. num_updates - 1: rises linearly, then follows the schedule."""
    if update < warmup_updates:
        return learning_rate * (update + 1) / (warmup_updates + 1)
    return learning_rate * decay_at(schedule, (update - warmup_updates) / max(num_updates - warmup_updates, 1))


@lru_cache(maxsize=1)  # asked for once per update
def order_of_pass(number: int, num_samples: int, seed: int) -> torch.Tensor:
    """The order of one pass over the data, int64 [num_samples]."""
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))


def batch_indices(update: int, num_samples: int, batch_size: int, seed: int) -> torch.Tensor:
    """The samples of one update, int64 [batch_size]: every pass over the data is shuffled anew, a rest is left out."""
    number, position = divmod(update, num_samples // batch_size)
    return order_of_pass(number, num_samples, seed)[position * batch_size : (position + 1) * batch_size]


def clone_loss(
    losses: torch.Tensor, predicted: torch.Tensor, batch: CloneBatch, decoded: torch.Tensor, total_weight: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean cross entropy of the tokens, and how far greedy actions are from the labels.

    Args:
        losses, predicted: [B, C, D], of VLAPolicy.clone(). decoded: [B, C, D], `predicted` normalised to [-1, 1].
        total_weight: sum of weights of the whole batch over all ranks, per rank; what this returns then sums up to the
            batch's mean over micro batches, averaged over ranks.
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
    """Raises ValueError where the policy's statistics cut off what the demonstrations do."""
    labels, tokens = torch.from_numpy(demos.labels).double(), policy.action_tokens
    span = 0.05 * (tokens.q99 - tokens.q01)  # quantiles leave out 1 % on either side by themselves
    outside = ((labels < tokens.q01 - span) | (labels > tokens.q99 + span)) & tokens.mask  # [M, 7]
    share, axis = outside.double().mean(dim=0).max(dim=0)
    if share > MAX_CLIPPED:
        raise ValueError(
            f"{share:.0%} of the demonstrations' actions are out of range in dimension {int(axis)} of --unnorm_key "
            f"{unnorm_key}: use their own statistics ({', '.join(demos.statistics)}) or smaller expert steps"
        )


def check_sizes(*, num_updates: int, updates_per_iteration: int, batch_size: int, world_size: int) -> None:
    """Raises UserError for the first sizes that do not go together."""
    if num_updates % updates_per_iteration:
        raise UserError(f"--num_updates {num_updates} is not a multiple of --updates_per_iteration")
    if batch_size % world_size:
        raise UserError(f"--batch_size {batch_size} is not divisible by {world_size} ranks")


def read_batch(
    demos: Demos,
    policy: VLAPolicy,
    index: torch.Tensor,
    draws: torch.Tensor | None,
    device: torch.device,
    label_sigma: float = 0.0,
    noise: torch.Tensor | None = None,
) -> CloneBatch:
    """Samples [B] from the file; draws [B, 6] augment their pictures, None leaves them. noise: uniform [B, C, D], which
    decides the context tokens where label_sigma spreads the targets."""
    obs = {"image": torch.from_numpy(demos.images(index.tolist()))}
    inputs = policy.preprocess(obs | {"task_description": [demos.instructions[i] for i in index]})
    if draws is not None:
        inputs = inputs._replace(images=augmentation.augment(inputs.images, draws))
    labels, valid = (torch.from_numpy(part) for part in demos.chunks(index, policy.chunk_size))
    labels = policy.action_tokens.normalize(labels)
    tokens = policy.action_tokens.encode(labels)
    context_tokens = tokens
    if label_sigma:
        spread = policy.action_tokens.soft_targets(tokens, label_sigma).log()
        context_tokens = sample_bins(spread, noise, greedy=False) + policy.action_tokens.first_id
    parts = (tokens, context_tokens, labels.float(), valid.float())
    return CloneBatch(inputs.to(device), *(part.to(device) for part in parts))


def main(args: Args) -> None:
    # ------------------------------------------------------------------ set-up: wrong input ends here
    with user_errors():
        launch = launched()
        check_sizes(**pick(args, check_sizes, world_size=launch.world_size))
        check_backends(args.logger_backends)
        ds_config = read_deepspeed_config(args.deepspeed_config, args.dtype, args.offload)
        demos = Demos(Path(args.demos))
        demos.check_world(**pick(args, demos.check_world))
        if len(demos) < args.batch_size:
            raise UserError(f"--demos {args.demos} has {len(demos)} steps, fewer than --batch_size {args.batch_size}")
        num_eval_envs = max(1, args.num_eval_envs // launch.world_size)
        workers = min(args.num_env_workers, num_eval_envs)
        eval_world = pick(args, make_envs, num_env_workers=workers, **ONE_PER_ID)
        check_envs(args.env_id, num_eval_envs, **eval_world)
        eval_ids = eval_episode_ids(args.env_id, args.obj_set, args.num_eval_episodes)
        told = every_instruction(args.env_id, args.obj_set, args.instruction) | set(demos.instructions)
        args.max_prompt_length = prompt_room(args.model_path, told, args.max_prompt_length)
        check_scene_memory(
            launch.ranks_here * num_eval_envs,
            launch.ranks_here * workers,
            args.image_size,
            "--num_eval_envs, --num_env_workers and --image_size",
        )
        device = setup_distributed(args.seed)
        default_dir = f"runs/sft_{args.env_id.replace(':', '.')}_{time.strftime('%Y%m%d_%H%M%S')}"
        run_dir, checkpoint = open_run(args.run_dir, args.resume, default_dir, asdict(args))
        export_dir = export_folder(run_dir, args.export_dir, flag_value(sys.argv[1:], "export_dir") is not None)
        num_iterations = args.num_updates // args.updates_per_iteration
        check_iterations_left(checkpoint, num_iterations, "--num_updates")
        in_words = (
            f"{launch.world_size} ranks, {args.batch_size} of {len(demos)} demonstrated decisions an optimizer step, "
            f"{args.num_updates} steps, evaluation in {num_eval_envs} envs and {workers} workers a rank"
        )
        print0(what_applies(**pick(args, what_applies, sizes=in_words)))
        model_flags = dict(norm_stats=demos.statistics, value_head=False, dtype=DTYPES[args.dtype], device=device)
        model_flags |= dict(cuda_graphs=True)
        policy = load_policy(args.model_path, args.model_type, **pick(args, load_policy, **model_flags))
        check_labels(policy, demos, args.unnorm_key)
        eval_envs = make_envs(args.env_id, num_eval_envs, **eval_world)

    rollout_copy = make_rollout_copy(policy, zero_stage(ds_config), args.offload)
    engine = build_engine(policy, ds_config, **pick(args, build_engine, value_learning_rate=None))
    stages = StageSwitcher(engine, rollout_copy, args.offload)
    guard = NonFiniteGuard(run_dir, rank())
    schedule = pick(args, learning_rate_at)
    local_batch_size = args.batch_size // world_size()
    mine = slice(rank() * local_batch_size, (rank() + 1) * local_batch_size)
    start_iteration, num_seen = 0, 0  # num_seen: decisions trained on, over all ranks
    with user_errors():
        if checkpoint:
            start_iteration, num_seen, _ = load_checkpoint(engine, checkpoint, 0, 0)
        begin_run(run_dir, checkpoint)
        logger = Logger(
            run_dir,
            rank() == 0,
            num_iterations,
            start_iteration,
            num_seen,
            args.logger_backends,
            "decisions",
            **pick(args, Logger),
        )
        sizes = {"num_iterations": num_iterations, "local_batch_size": local_batch_size, "num_samples": len(demos)}
        preemption = Preemption(engine, run_dir, args.keep_checkpoints)
        logger.describe(describe_run(asdict(args), sizes, world_size()))

    def run_evaluation(iteration: int) -> bool:
        """The held-out episodes, with whole weights; rank 0 films its first batch. False: this run was asked to end."""
        with logger.timer("eval"), rollout_stage(stages) as actor:
            with logger.video(VideoWriter, iteration) as video:
                means = evaluate(actor, eval_envs, eval_ids, args.eval_temperature, video, preemption)
        if means is not None:
            logger.write_evaluation(iteration, num_seen, means)
        return means is not None

    # that of the starting policy, or one that was broken off
    wanted = start_iteration == 0 or due(start_iteration - 1, args.eval_freq, num_iterations)
    if wanted and logger.lacks_evaluation(start_iteration) and not run_evaluation(start_iteration):
        preemption.exit(checkpoint or save_checkpoint(engine, run_dir, 0, 0, [], args.keep_checkpoints))

    for iteration in range(start_iteration, num_iterations):
        preemption.snapshot(iteration, num_seen, [])
        # ------------------------------------------------------------------ update: ranks in lock-step
        averages = Averages()
        with logger.timer("update"), update_stage(stages):
            for update in range(iteration * args.updates_per_iteration, (iteration + 1) * args.updates_per_iteration):
                rate = learning_rate_at(update, **schedule)
                engine.optimizer.param_groups[0]["lr"] = rate
                index = batch_indices(update, len(demos), args.batch_size, args.seed)
                generator = torch.Generator().manual_seed(args.seed + 7919 * update)
                draws = augmentation.draw(args.batch_size, generator)
                noise = uniform_noise(args.batch_size, args.chunk_size, generator)
                total = float(demos.chunks(index, args.chunk_size)[1].sum()) / world_size()
                parts = list(zip(*(whole[mine].split(args.micro_batch_size) for whole in (index, draws, noise))))
                for number, (part, part_draws, part_noise) in enumerate(parts, 1):
                    part_draws = part_draws if args.image_aug else None
                    batch = read_batch(demos, policy, part, part_draws, device, args.label_sigma, part_noise)
                    losses, predicted = engine(
                        "clone", batch.inputs, batch.tokens, args.label_sigma, batch.context_tokens
                    )
                    decoded = policy.action_tokens.decode(predicted).float().to(device)
                    loss, metrics = clone_loss(losses, predicted, batch, decoded, total)
                    guard.check_gradients(backward(engine, loss, last=number == len(parts)), batch, loss)
                    averages.add(metrics)
                preemption.exit_if_requested()
        num_seen += args.updates_per_iteration * args.batch_size

        # ------------------------------------------------------------------ log, evaluate, save
        stopped = due(iteration, args.eval_freq, num_iterations) and not run_evaluation(iteration + 1)
        metrics = averages.reduce(count=args.updates_per_iteration) | guard.pop_metrics() | stages.pop_metrics()
        metrics["train/actor/lr"] = rate
        logger.write(iteration + 1, num_seen, metrics, [], 0)
        if stopped or due(iteration, args.save_freq, num_iterations):
            saved = save_checkpoint(engine, run_dir, iteration + 1, num_seen, [], args.keep_checkpoints)
            if stopped:  # --resume makes the evaluation again
                preemption.exit(saved)

    export_policy(engine.module, whole_state_dict(engine, keep=rank() == 0), run_dir, export_dir)
    for opened in (logger, eval_envs):
        opened.close()


if __name__ == "__main__":
    run_main(main, lambda: parse_args(Args, sys.argv[1:], description="\n\n".join(__doc__.split("\n\n")[:2])))
