"""OpenVLA-OFT: a whole chunk of actions in one pass, in which every position sees every other one.

This is the discrete-token variant behind RLinf's ManiSkill results. The network has the same parameters as OpenVLA. The
prompt is followed by 7 * chunk_size placeholders with zero embeddings, and attention is not causal. There is no L1
head, proprioception or FiLM.

    B samples   S prompt and patch positions   K = 7 * chunk_size action tokens   H hidden width   V vocabulary

Sequence: [BOS, P patches, padding, rest of the prompt, K zeros]. For moojink's checkpoints a stop token with its real
embedding follows (`stop_token`). The last prompt token predicts action token 0, placeholder k predicts token k + 1.
Source: moojink/openvla-oft with its fork of transformers (bidirectional attention), RLinf's openvla_oft model.
"""

import torch

from schemas import UserError
from vla.models.openvla import Choose, OpenVLA, positions

STOP_ID = 2  # </s>

PUBLISHED_CHUNK_SIZE = 8  # actions per decision of the discrete OpenVLA-OFT checkpoints. Their config.json omits it


class OpenVLAOFT(OpenVLA):
    """The network alone, with the same calls as OpenVLA.

    Args:
        config: the content of a checkpoint's config.json.
        num_tokens: K, the number of action tokens of a decision.
        stop_token: whether the sequence ends with </s> (moojink's checkpoints) or not (RLinf's).

    Raises:
        UserError: the config asks for causal attention.
    """

    def __init__(self, config: dict, num_tokens: int, stop_token: bool = False):
        if config.get("is_causal") or config["text_config"].get("is_causal"):
            raise UserError(
                "config.json says is_causal, but OpenVLA-OFT reads its placeholders with bidirectional attention: load "
                "an autoregressive checkpoint with --model_type openvla, or remove the key from an OFT checkpoint"
            )
        super().__init__(config)
        self.num_tokens = num_tokens
        self.stop_token = stop_token

    def forward(
        self,
        images: torch.Tensor,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        features: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over prompt and placeholders.

        Args:
            images, prompt_ids, prompt_mask, features: as for OpenVLA.prefix().
            tokens: not used, because a chunk's tokens are predicted without seeing each other.

        Returns:
            logits [B, K, V] in the model's precision, and hidden [B, H] at the last prompt token.
        """
        embeddings, mask = self.prefix(images, prompt_ids, prompt_mask, features)
        num_prompt = embeddings.shape[1]
        tail = [embeddings.new_zeros(len(embeddings), self.num_tokens, self.hidden_size)]
        if self.stop_token:
            stop = prompt_ids.new_full((len(embeddings), 1), STOP_ID)
            tail.append(self.language_model.model.embed_tokens(stop))
        embeddings = torch.cat([embeddings, *tail], dim=1)
        length = embeddings.shape[1]
        mask = torch.cat([mask, mask.new_ones(len(mask), length - num_prompt)], dim=1)
        # transformers uses a mask of four dimensions unchanged, so every query sees every real key. moojink's fork of
        # transformers copies the causal mask's last row to all rows, which is the same
        output = self.language_model.model(
            inputs_embeds=embeddings,
            attention_mask=mask[:, None, None].expand(-1, 1, length, -1),
            position_ids=positions(mask),
            use_cache=False,
        )
        hidden = output.last_hidden_state[:, num_prompt - 1 : num_prompt - 1 + self.num_tokens]  # [B, K, H]
        return self.language_model.lm_head(hidden), hidden[:, 0]

    def generate(
        self,
        images: torch.Tensor,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        features: torch.Tensor | None = None,
        *,
        num_tokens: int,
        choose: Choose,
    ) -> torch.Tensor:
        """Write all tokens at once: choose() is called once, with K = num_tokens. Returns hidden [B, H].

        Nothing is recorded as a CUDA graph: one pass has few kernels for its arithmetic (docs/performance.md).
        """
        if num_tokens != self.num_tokens:
            raise ValueError(f"this model was built for {self.num_tokens} action tokens, asked for {num_tokens}")
        logits, hidden = self.forward(images, prompt_ids, prompt_mask, features)
        choose(logits, 0)
        return hidden

    @torch.no_grad()
    def check_bidirectional(self) -> None:
        """Check that the first position depends on the last one. A causal kernel would give nearly random actions.

        It runs the first two layers on four positions, and so tests the kernel that this installation really uses.

        Raises:
            RuntimeError: attention is causal.
        """
        llama = self.language_model.model
        weight = llama.norm.weight
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(1, 4, self.hidden_size, generator=generator).to(weight.device, weight.dtype)
        changed = base.clone()
        changed[:, -1] *= -2.0
        mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=weight.device)
        position_ids = torch.arange(4, device=weight.device)[None]
        first = []
        for hidden in (base, changed):
            rotary = llama.rotary_emb(hidden, position_ids=position_ids)
            for layer in llama.layers[:2]:
                hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=position_ids)
            first.append(hidden[:, 0])
        if torch.equal(*first):
            raise RuntimeError(
                "the language model attends causally in this installation and OpenVLA-OFT needs bidirectional "
                "attention: install the versions that requirements.txt pins"
            )
