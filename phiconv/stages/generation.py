"""What a runtime that decodes is measured by: its KV cache against prefill, its generation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from phiconv.runtimes import GeneratingRuntime
    from phiconv.runtimes.reference import LanguageModelHead
    from phiconv.stages.stage import StageContext
    from phiconv.stages.validate import ValidateParams

# As many windows, starting from as many of their tokens.
_PROMPTS = 2
PROMPT_TOKENS = 32


def generation_metrics(
    runtime: GeneratingRuntime,
    params: ValidateParams,
    windows: NDArray[np.int64],
    head: LanguageModelHead,
    ctx: StageContext,
) -> dict[str, float]:
    """Decoding against prefill on one window, and greedy generation against the reference's."""
    import numpy as np

    from phiconv.metrics.summary import decode_error, greedy_agreement

    window = windows[0][: 2 * PROMPT_TOKENS]
    prefill = next(iter(runtime.logits(window[None])))
    start = len(window) // 2
    decoded = runtime.decode_logits(window, start)

    prompts = [window[:PROMPT_TOKENS] for window in windows[:_PROMPTS]]
    generated = [runtime.generate(prompt, params.generate_tokens) for prompt in prompts]
    expected = _reference_choices(prompts, generated, params, head, ctx)
    return {
        "decode_error.max": decode_error(prefill[start:], decoded),
        "greedy_agreement": greedy_agreement(np.concatenate(generated), expected),
    }


def _reference_choices(
    prompts: Sequence[NDArray[np.int64]],
    generated: Sequence[NDArray[np.int64]],
    params: ValidateParams,
    head: LanguageModelHead,
    ctx: StageContext,
) -> NDArray[np.int64]:
    """What the reference ranks first at each generated token, given the tokens before it.

    One pass of the reference over the finished sequences: no generation of its own, so its memory
    stays that of one layer.
    """
    import numpy as np

    from phiconv.runtimes.reference import final_hidden_states

    ends = [len(p) + len(g) for p, g in zip(prompts, generated, strict=True)]
    # attention is causal: what stands after a sequence's end changes nothing before it
    sequences = np.zeros((len(prompts), max(ends)), dtype=np.int64)
    for row, prompt, tokens in zip(sequences, prompts, generated, strict=True):
        row[: len(prompt) + len(tokens)] = np.concatenate([prompt, tokens])
    hidden = final_hidden_states(
        ctx.checkpoint, sequences, device=params.reference_device, threads=ctx.threads
    )
    rows = [
        head.logits(states[len(prompt) - 1 : end - 1]).argmax(axis=1)
        for states, prompt, end in zip(hidden, prompts, ends, strict=True)
    ]
    return np.concatenate(rows)
