"""The programs of a server: prompts into slots, one more token for all of them; sampling within.

Both take a plan, i32[n, 5 + S], of which every row is (slot, length, seed, temperature, top_p) and
S tokens; temperature and top_p are the bits of an f32. S = 0 is a decoding step, with a row for
every slot. A row whose slot is -1 is not there. One array is one transfer to the device, and one
message to other processes.
"""

import concurrent.futures
import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jax_w4moe.models import Cache, GptOss
from jax_w4moe.serving import checks
from jax_w4moe.serving.sampling import sample

COLUMNS = 5
NOWHERE = -1  # the slot of a row that is not there
MAX_PROMPTS = 4  # of one prefill
_SHORTEST = 64  # the least length that prompts are padded to


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What stays on the device: the cache, and every slot's last token, i32[slots]."""

    cache: Cache
    tokens: Array


def default_prompt_lengths(capacity: int) -> tuple[int, ...]:
    """Powers of two from 64 on and the middles between them, up to the capacity itself."""
    lengths, power = [], _SHORTEST
    while power < capacity:
        lengths += [power, power * 3 // 2]
        power *= 2
    return (*(length for length in lengths if length < capacity), capacity)


def prefill_shapes(
    slots: int,
    capacity: int,
    prompt_lengths: Iterable[int] | None = None,
    prefill_tokens: int = 1024,
) -> dict[int, int]:
    """How many prompts a prefill takes, by the length they are padded to; as for ``Steps``."""
    lengths = sorted(set(prompt_lengths or default_prompt_lengths(capacity)))
    checks.sizes(slots, capacity, lengths, prefill_tokens)
    at_most = min(MAX_PROMPTS, slots)
    return {length: max(1, min(at_most, prefill_tokens // length)) for length in lengths}


class Steps:
    """A model's programs for a number of slots, compiled by :meth:`warm_up` and never again.

    Every length that prompts are padded to has one number of prompts: a request always goes through
    the same programs, so that its answer does not depend on its company in any bit.

    Attributes:
      slots: sequences that are decoded together.
      capacity: tokens that each can hold.
      prompts: how many prompts a prefill takes, by the length they are padded to, ascending.
      vocab_size: of the model.
      eos_token_ids: the model's tokens that end a text.
    """

    def __init__(
        self,
        model: GptOss,
        *,
        slots: int,
        capacity: int,
        prompt_lengths: Iterable[int] | None = None,
        prefill_tokens: int = 1024,
    ) -> None:
        """Allocates the cache.

        Args:
          model: the model; on a mesh, of all processes.
          slots: sequences that are decoded together.
          capacity: tokens that each can hold, prompt and answer.
          prompt_lengths: what prompts are padded to; None: powers of two and the middles between
            them, up to the capacity.
          prefill_tokens: padded tokens that a prefill of several prompts has at most: as long as
            it takes, the other sequences wait.

        Raises:
          ValueError: sizes that do not fit.
        """
        self.prompts = prefill_shapes(slots, capacity, prompt_lengths, prefill_tokens)
        self.slots = slots
        self.capacity = capacity
        self.vocab_size = model.config.vocab_size
        self.eos_token_ids = model.config.eos_token_ids
        everywhere = None if model.mesh is None else NamedSharding(model.mesh, PartitionSpec())
        tokens = jnp.zeros((slots,), jnp.int32, device=everywhere)
        self._state = State(model.init_cache(slots, capacity), tokens)
        self._weights, structure = jax.tree.flatten(model)
        placed: dict[str, Any] = {}
        if everywhere is not None:
            # As it came in, or the next call would see another sharding and be compiled again.
            state_shardings = jax.tree.map(lambda leaf: leaf.sharding, self._state)
            placed = {"out_shardings": (everywhere, state_shardings)}

        def step(weights: list[Array], state: State, plan: Array) -> tuple[Array, State]:
            module: GptOss = jax.tree.unflatten(structure, weights)
            return (_decode if plan.shape[1] == COLUMNS else _prefill)(module, state, plan)

        self._step = jax.jit(step, donate_argnums=1, **placed)
        self._programs: dict[tuple[int, ...], jax.stages.Compiled] = {}

    def empty_plan(self, length: int = 0) -> np.ndarray:
        """A plan of rows that are not there.

        Args:
          length: one of ``prompts`` for a prefill, 0 for a decoding step.

        Returns:
          i32[n, 5 + length].
        """
        plan = np.zeros((self.prompts.get(length, self.slots), COLUMNS + length), np.int32)
        plan[:, 0] = NOWHERE
        return plan

    def run(self, plan: np.ndarray) -> Array:
        """Starts a step, and does not wait for it.

        Args:
          plan: i32[n, 5 + S], which must not be changed any more.

        Returns:
          i32[n], the token of every row; -1 where it is not there or its logits are NaN.
        """
        if plan.shape not in self._programs:
            self._compile(plan)
        ids, self._state = self._programs[plan.shape](self._weights, self._state, plan)
        ids.copy_to_host_async()
        return ids

    def warm_up(self) -> None:
        """Compiles everything, runs it once, and waits."""
        plans = [self.empty_plan(length) for length in (0, *self.prompts)]
        # Processes exchange what they measure while they compile, in the order of the programs.
        at_once = 1 if jax.process_count() > 1 else None
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            list(pool.map(self._compile, plans))
        for plan in plans:
            np.asarray(self.run(plan))

    def _compile(self, plan: np.ndarray) -> None:
        lowered = self._step.lower(self._weights, self._state, plan)
        self._programs[plan.shape] = lowered.compile()


def write_row(
    row: np.ndarray,
    slot: int,
    seed: int,
    temperature: float,
    top_p: float,
    prompt: tuple[int, ...] = (),
) -> None:
    """Fills a row of a plan."""
    row[:2] = slot, len(prompt)
    row[2:3].view(np.uint32)[:] = seed
    row[3:5].view(np.float32)[:] = temperature, top_p
    row[COLUMNS : COLUMNS + len(prompt)] = prompt


def _prefill(model: GptOss, state: State, plan: Array) -> tuple[Array, State]:
    slots, lengths = plan[:, 0], plan[:, 1]
    logits, cache = model.prefill(state.cache, plan[:, COLUMNS:], lengths, slots)
    ids = _sample(logits, plan, lengths)
    at = jnp.where(slots >= 0, slots, cache.batch)
    return ids, State(cache, state.tokens.at[at].set(ids, mode="drop"))


def _decode(model: GptOss, state: State, plan: Array) -> tuple[Array, State]:
    active = plan[:, 0] >= 0
    logits, cache = model.decode(state.cache, state.tokens, active)
    ids = _sample(logits, plan, cache.lengths)
    return ids, State(cache, jnp.where(active, ids, state.tokens))


def _sample(logits: Array, plan: Array, positions: Array) -> Array:
    seeds = jax.lax.bitcast_convert_type(plan[:, 2], jnp.uint32)
    settings = jax.lax.bitcast_convert_type(plan[:, 3:5], jnp.float32)
    # Whole rows lie on every device: a choice needs no exchange.
    return sample(logits, seeds, positions, settings[:, 0], settings[:, 1])
