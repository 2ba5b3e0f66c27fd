"""The two critics of PPO, with one interface for the rollout.

HiddenCritic is the published one: a value head on the language model's hidden state, which is a part of the model. Its
loss is a term of ppo_loss().

StateCritic reads the simulator's state (`--critic state`). In simulation the critic can read what the policy has to
infer from an image: poses, grasps, and how much time is left. The idea is the "asymmetric actor critic" of arXiv
1710.06542. Time in the critic's input is from arXiv 1712.00378. A baseline may depend on anything except the action
that it judges. It then adds no bias to the policy gradient, and reduces its variance. (With lambda below 1 a wrong V
biases the gradient, as any critic's does.) This critic also sees the state before each action of a chunk. The language
model's hidden state is known only once per chunk.

StateCritic is a small network outside the engine. Every rank has all of it and fits it to all ranks' experience in the
same order. So the ranks' copies stay equal without a reduction, and the number of ranks does not matter. Only training
needs it, and a saved policy does not contain it.

    T decisions per rollout   N envs on this rank   C actions per decision   S numbers per state
    K executed actions of all ranks
"""

import torch
from torch import Tensor, nn

from vla.distributed import all_gather_lists
from vla.models.policy import VLAPolicy
from vla.models.value_head import value_errors

WIDTH = 256
BATCH = 256  # actions per optimizer step
LIMIT = 5.0  # inputs are clipped to so many standard deviations


class HiddenCritic:
    """V from the language model's hidden state, which the policy computes when it acts."""

    def value(self, actor: VLAPolicy, obs: dict) -> Tensor:
        """V of observations, fp32 [n], on the CPU. One pass over the prompt."""
        return actor.value(actor.prepare(obs))[:, 0].float().cpu()

    def decision_values(self, obs: dict, values: Tensor) -> Tensor:
        """V of the observations of a decision, on the CPU. values: [n, C], the policy's own."""
        return values.cpu()

    def chunk_values(self, t: int, envs: slice, infos: dict, decision_values: Tensor) -> Tensor:
        """V before each action of decision t, [n, C], which is known since the decision."""
        return decision_values

    def fit(self, *rollout: Tensor | torch.Generator) -> dict[str, float]:
        """Do nothing, because the engine trains this critic together with the policy."""
        return {}


class StateCritic:
    """V(state), with storage for the states of one rollout.

    Args:
        num_chunks, num_envs, chunk_size, state_size: T, N, C, S.
        seed: seed of the initial weights, the same on every rank.
        value_learning_rate: learning rate of AdamW.
        huber_delta, value_clip: as for value_errors().
        critic_epochs: number of passes over a rollout.
    """

    def __init__(
        self,
        num_chunks: int,
        num_envs: int,
        chunk_size: int,
        state_size: int,
        device: torch.device,
        seed: int,
        *,
        value_learning_rate: float,
        huber_delta: float,
        value_clip: float | None,
        critic_epochs: int,
    ):
        self.states = torch.zeros(num_chunks, num_envs, chunk_size, state_size)  # before each executed action
        self.fitted = self.states  # those that fit() reads, of other envs where other ranks acted
        self.device, self.critic_epochs = device, critic_epochs
        self.value_loss = dict(huber_delta=huber_delta, value_clip=value_clip)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(state_size, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1)
            ).to(device)
        nn.init.zeros_(self.net[-1].weight)  # at first V is the same for all states: the bias
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=value_learning_rate, weight_decay=0.01)
        self.count = 0  # states seen so far
        self.mean = torch.zeros(state_size, dtype=torch.float64)
        self.squares = torch.zeros(state_size, dtype=torch.float64)  # sum of squared differences from the mean

    # ------------------------------------------------------------------ rollout
    def value(self, actor: VLAPolicy, obs: dict) -> Tensor:
        """V of observations, fp32 [n], on the CPU."""
        return self(obs["state"])

    def decision_values(self, obs: dict, values: Tensor) -> Tensor:
        """V of the state at a decision, [n, 1]. values: unused, because the policy has no critic."""
        return self(obs["state"])[:, None]

    def chunk_values(self, t: int, envs: slice, infos: dict, decision_values: Tensor) -> Tensor:
        """V of the states before each action of decision t, [n, C], which are stored for fit()."""
        states = infos["states"]  # [n, C, S]
        slot = self.states[t, envs]
        if states.shape != slot.shape:
            raise ValueError(f"states: the critic holds {tuple(slot.shape)}, got {tuple(states.shape)}")
        slot.copy_(states)
        return self(states)

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        """The values of states: float32 [..., S] -> float32 [...], on the CPU."""
        return self.net(self._normalized(states))[..., 0].cpu()

    def _normalized(self, states: Tensor) -> Tensor:
        """States [..., S] with mean 0 and variance 1 over all states so far. Constant inputs are only centred."""
        deviation = (self.squares / max(self.count, 1)).sqrt()
        deviation = torch.where(deviation > 1e-4, deviation, 1.0)
        return ((states.double() - self.mean) / deviation).clamp(-LIMIT, LIMIT).float().to(self.device)

    # ------------------------------------------------------------------ update
    def fit(self, returns: Tensor, old_values: Tensor, valid: Tensor, generator: torch.Generator) -> dict[str, float]:
        """Regress on the returns of the stored rollout, and return metrics of the last pass. All ranks together.

        Args:
            returns, old_values, valid: [T, N, C], with old_values as chunk_values() returned them.
            generator: in the same state on every rank. It decides the order.
        """
        states, returns, old_values = self._gathered(returns, old_values, valid)  # [K, S], [K], [K]
        self._update_statistics(states)
        inputs = self._normalized(states)  # [K, S]
        for _ in range(self.critic_epochs):
            losses, moved = [], []
            for index in torch.randperm(len(inputs), generator=generator).to(self.device).split(BATCH):
                values = self.net(inputs[index])[:, 0]
                errors, clipped = value_errors(values, old_values[index], returns[index], **self.value_loss)
                loss = errors.mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                losses.append(loss.detach() * len(index))
                moved.append(clipped.sum())
        mean_loss, share_moved = (float(sum(parts)) / max(len(inputs), 1) for parts in (losses, moved))
        return {"train/critic/value_loss": mean_loss, "train/critic/value_clip_ratio": share_moved}

    def _gathered(self, returns: Tensor, old_values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States [K, S], returns [K] and old values [K] of the actions that any rank executed. All ranks together."""
        own = (self.fitted, returns, old_values, valid)
        by_rank = all_gather_lists([tuple(field.numpy() for field in own)])
        states, returns, old_values, valid = (  # [T, all envs in their global order, C, ...] each
            torch.cat([torch.from_numpy(field) for field in fields], dim=1) for fields in zip(*by_rank)
        )
        return states[valid], returns[valid].to(self.device), old_values[valid].to(self.device)

    def _update_statistics(self, states: Tensor) -> None:
        """Add states [K, S] to the running mean and variance (Chan et al. 1979, pairwise)."""
        num_states = len(states)
        if num_states == 0:
            return
        states, count_before = states.double(), self.count
        mean = states.mean(0)  # [S]
        squares = ((states - mean) ** 2).sum(0)  # [S]
        self.count += num_states
        change = mean - self.mean
        self.squares = self.squares + squares + change**2 * count_before * num_states / self.count
        self.mean = self.mean + change * num_states / self.count

    # ------------------------------------------------------------------ other ranks, checkpoint
    def weights(self) -> dict:
        """What values depend on."""
        names = ("count", "mean", "squares")
        return {"net": self.net.state_dict()} | {name: getattr(self, name) for name in names}

    def load_weights(self, weights: dict) -> None:
        self.net.load_state_dict(weights["net"])
        self.count, self.mean, self.squares = weights["count"], weights["mean"], weights["squares"]

    def state_dict(self) -> dict:
        return self.weights() | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore network, optimizer and statistics. Learning rate and weight decay stay those of this run's flags."""
        rates = [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.load_weights(state)
        self.optimizer.load_state_dict(state["optimizer"])
        for group, (rate, decay) in zip(self.optimizer.param_groups, rates):
            group["lr"], group["weight_decay"] = rate, decay
