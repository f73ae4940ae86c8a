"""What the runtimes' own loading code made of checkpoints that qtool wrote.

`python -m tests.checkpoint.readings` runs all readers and writes the rows below; the tests hold them to it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """What was counted.

    Attributes:
        parameters: that the runtime's model has; 0 where it was not built.
        tensors: in the files that some code of the runtime's looked into.
        untouched: parameters of which not every number came from the files.
        unread: tensors that no code looked into, but those that only repeat what others say.
        mistyped: tensors that were put into a parameter of another kind of numbers.
    """

    parameters: int
    tensors: int
    untouched: int
    unread: int
    mistyped: int


@dataclass(frozen=True)
class Reading:
    """One tiny bfloat16 model of a family, quantized by one of the recipe's schemes, in the hands of a runtime.

    Attributes:
        runtime: its name.
        format: as `--format` has it.
        architecture: as config.json has it.
        scheme: of the recipe.
        error: the class of the exception instead; empty where there was none.
    """

    runtime: str
    format: str
    architecture: str
    scheme: str
    counts: Counts
    error: str = ""

    @property
    def well(self) -> bool:
        """Whether the runtime's model is what is in the files."""
        return not (self.error or self.counts.untouched or self.counts.unread or self.counts.mistyped)


_ROWS = """\
vllm compressed-tensors DeepseekV3ForCausalLM w8a8 51 107 0 0 0 -
vllm compressed-tensors DeepseekV3ForCausalLM w8a8-dynamic 39 91 0 0 0 -
vllm compressed-tensors Glm4MoeForCausalLM w8a8 43 111 0 0 0 -
vllm compressed-tensors Glm4MoeForCausalLM w8a8-dynamic 35 95 0 0 0 -
vllm compressed-tensors Glm4MoeForCausalLM w8a8-static 43 93 0 0 0 -
vllm compressed-tensors LlamaForCausalLM w8a8 31 51 0 0 0 -
vllm compressed-tensors LlamaForCausalLM w8a8-dynamic 23 35 0 0 0 -
vllm compressed-tensors LlamaForCausalLM w8a8-static 33 57 0 0 0 -
vllm compressed-tensors MistralForCausalLM w8a8 31 51 0 0 0 -
vllm compressed-tensors MistralForCausalLM w8a8-dynamic 23 35 0 0 0 -
vllm compressed-tensors MistralForCausalLM w8a8-static 33 57 0 0 0 -
vllm compressed-tensors MixtralForCausalLM w8a8 33 113 0 0 0 -
vllm compressed-tensors MixtralForCausalLM w8a8-dynamic 25 97 0 0 0 -
vllm compressed-tensors MixtralForCausalLM w8a8-static 29 77 0 0 0 -
vllm compressed-tensors Qwen2ForCausalLM w8a8 33 57 0 0 0 -
vllm compressed-tensors Qwen2ForCausalLM w8a8-dynamic 25 41 0 0 0 -
vllm compressed-tensors Qwen2ForCausalLM w8a8-static 35 63 0 0 0 -
vllm compressed-tensors Qwen3ForCausalLM w8a8 35 55 0 0 0 -
vllm compressed-tensors Qwen3ForCausalLM w8a8-dynamic 27 39 0 0 0 -
vllm compressed-tensors Qwen3ForCausalLM w8a8-static 37 61 0 0 0 -
vllm compressed-tensors Qwen3MoeForCausalLM w8a8 37 141 0 0 0 -
vllm compressed-tensors Qwen3MoeForCausalLM w8a8-dynamic 29 125 0 0 0 -
vllm compressed-tensors Qwen3MoeForCausalLM w8a8-static 33 93 0 0 0 -
vllm compressed-tensors TeleChat2ForCausalLM w8a8 0 0 0 0 0 ValueError
vllm compressed-tensors TeleChat2ForCausalLM w8a8-dynamic 27 35 0 0 0 -
vllm compressed-tensors TeleChat2ForCausalLM w8a8-static 0 0 0 0 0 ValueError
transformers compressed-tensors DeepseekV3ForCausalLM w8a8 0 0 0 0 0 RuntimeError
transformers compressed-tensors DeepseekV3ForCausalLM w8a8-dynamic 0 0 0 0 0 RuntimeError
transformers compressed-tensors Glm4MoeForCausalLM w8a8 0 0 0 0 0 RuntimeError
transformers compressed-tensors Glm4MoeForCausalLM w8a8-dynamic 0 0 0 0 0 RuntimeError
transformers compressed-tensors Glm4MoeForCausalLM w8a8-static 71 69 2 24 0 -
transformers compressed-tensors Glm4vForConditionalGeneration w8a8 77 77 0 0 0 -
transformers compressed-tensors Glm4vForConditionalGeneration w8a8-dynamic 61 61 0 0 0 -
transformers compressed-tensors Glm4vForConditionalGeneration w8a8-static 79 79 0 0 0 -
transformers compressed-tensors LlamaForCausalLM w8a8 51 51 0 0 0 -
transformers compressed-tensors LlamaForCausalLM w8a8-dynamic 35 35 0 0 0 -
transformers compressed-tensors LlamaForCausalLM w8a8-static 57 57 0 0 0 -
transformers compressed-tensors MistralForCausalLM w8a8 51 51 0 0 0 -
transformers compressed-tensors MistralForCausalLM w8a8-dynamic 35 35 0 0 0 -
transformers compressed-tensors MistralForCausalLM w8a8-static 57 57 0 0 0 -
transformers compressed-tensors MixtralForCausalLM w8a8 0 0 0 0 0 RuntimeError
transformers compressed-tensors MixtralForCausalLM w8a8-dynamic 0 0 0 0 0 RuntimeError
transformers compressed-tensors MixtralForCausalLM w8a8-static 45 77 4 36 0 -
transformers compressed-tensors Qwen2ForCausalLM w8a8 57 57 0 0 0 -
transformers compressed-tensors Qwen2ForCausalLM w8a8-dynamic 41 41 0 0 0 -
transformers compressed-tensors Qwen2ForCausalLM w8a8-static 63 63 0 0 0 -
transformers compressed-tensors Qwen3ForCausalLM w8a8 55 55 0 0 0 -
transformers compressed-tensors Qwen3ForCausalLM w8a8-dynamic 39 39 0 0 0 -
transformers compressed-tensors Qwen3ForCausalLM w8a8-static 61 61 0 0 0 -
transformers compressed-tensors Qwen3MoeForCausalLM w8a8 0 0 0 0 0 RuntimeError
transformers compressed-tensors Qwen3MoeForCausalLM w8a8-dynamic 0 0 0 0 0 RuntimeError
transformers compressed-tensors Qwen3MoeForCausalLM w8a8-static 49 45 4 48 0 -
transformers compressed-tensors TeleChat2ForCausalLM w8a8 0 0 0 0 0 ValueError
transformers compressed-tensors TeleChat2ForCausalLM w8a8-dynamic 0 0 0 0 0 ValueError
transformers compressed-tensors TeleChat2ForCausalLM w8a8-static 0 0 0 0 0 ValueError
sglang compressed-tensors Glm4MoeForCausalLM w8a8 0 0 0 0 0 ValueError
sglang compressed-tensors Glm4MoeForCausalLM w8a8-dynamic 0 0 0 0 0 ValueError
sglang compressed-tensors Glm4MoeForCausalLM w8a8-static 0 0 0 0 0 ValueError
sglang compressed-tensors LlamaForCausalLM w8a8 0 0 0 0 0 ValueError
sglang compressed-tensors LlamaForCausalLM w8a8-dynamic 23 35 0 0 0 -
sglang compressed-tensors LlamaForCausalLM w8a8-static 0 0 0 0 0 ValueError
sglang compressed-tensors MistralForCausalLM w8a8 0 0 0 0 0 ValueError
sglang compressed-tensors MistralForCausalLM w8a8-dynamic 23 35 0 0 0 -
sglang compressed-tensors MistralForCausalLM w8a8-static 0 0 0 0 0 ValueError
sglang compressed-tensors MixtralForCausalLM w8a8 0 0 0 0 0 ValueError
sglang compressed-tensors MixtralForCausalLM w8a8-dynamic 0 0 0 0 0 ValueError
sglang compressed-tensors MixtralForCausalLM w8a8-static 0 0 0 0 0 ValueError
sglang compressed-tensors Qwen2ForCausalLM w8a8 0 0 0 0 0 ValueError
sglang compressed-tensors Qwen2ForCausalLM w8a8-dynamic 25 41 0 0 0 -
sglang compressed-tensors Qwen2ForCausalLM w8a8-static 0 0 0 0 0 ValueError
sglang compressed-tensors Qwen3ForCausalLM w8a8 0 0 0 0 0 ValueError
sglang compressed-tensors Qwen3ForCausalLM w8a8-dynamic 27 39 0 0 0 -
sglang compressed-tensors Qwen3ForCausalLM w8a8-static 0 0 0 0 0 ValueError
sglang compressed-tensors Qwen3MoeForCausalLM w8a8 0 0 0 0 0 NotImplementedError
sglang compressed-tensors Qwen3MoeForCausalLM w8a8-dynamic 0 0 0 0 0 NotImplementedError
sglang compressed-tensors Qwen3MoeForCausalLM w8a8-static 0 0 0 0 0 IndexError
vllm-ascend modelslim DeepseekV3ForCausalLM w8a8 75 161 0 0 0 -
vllm-ascend modelslim DeepseekV3ForCausalLM w8a8-dynamic 51 129 0 0 0 -
vllm-ascend modelslim Glm4MoeForCausalLM w8a8 61 165 0 0 0 -
vllm-ascend modelslim Glm4MoeForCausalLM w8a8-dynamic 45 133 0 0 0 -
vllm-ascend modelslim Glm4MoeForCausalLM w8a8-static 61 129 0 0 0 -
vllm-ascend modelslim LlamaForCausalLM w8a8 47 81 0 0 0 -
vllm-ascend modelslim LlamaForCausalLM w8a8-dynamic 31 49 0 0 0 -
vllm-ascend modelslim LlamaForCausalLM w8a8-static 51 93 0 0 0 -
vllm-ascend modelslim MistralForCausalLM w8a8 47 81 0 0 0 -
vllm-ascend modelslim MistralForCausalLM w8a8-dynamic 31 49 0 0 0 -
vllm-ascend modelslim MistralForCausalLM w8a8-static 51 93 0 0 0 -
vllm-ascend modelslim MixtralForCausalLM w8a8 0 0 0 0 0 KeyError
vllm-ascend modelslim MixtralForCausalLM w8a8-dynamic 0 0 0 0 0 KeyError
vllm-ascend modelslim MixtralForCausalLM w8a8-static 41 101 0 0 0 -
vllm-ascend modelslim Qwen2ForCausalLM w8a8 49 87 0 0 0 -
vllm-ascend modelslim Qwen2ForCausalLM w8a8-dynamic 33 55 0 0 0 -
vllm-ascend modelslim Qwen2ForCausalLM w8a8-static 53 99 0 0 0 -
vllm-ascend modelslim Qwen3ForCausalLM w8a8 51 85 0 0 0 -
vllm-ascend modelslim Qwen3ForCausalLM w8a8-dynamic 35 53 0 0 0 -
vllm-ascend modelslim Qwen3ForCausalLM w8a8-static 55 97 0 0 0 -
vllm-ascend modelslim Qwen3MoeForCausalLM w8a8 53 213 0 0 0 -
vllm-ascend modelslim Qwen3MoeForCausalLM w8a8-dynamic 37 181 0 0 0 -
vllm-ascend modelslim Qwen3MoeForCausalLM w8a8-static 45 117 0 0 0 -
vllm-ascend modelslim TeleChat2ForCausalLM w8a8 0 0 0 0 0 KeyError
vllm-ascend modelslim TeleChat2ForCausalLM w8a8-dynamic 0 0 0 0 0 KeyError
vllm-ascend modelslim TeleChat2ForCausalLM w8a8-static 0 0 0 0 0 KeyError
vllm-ascend compressed-tensors LlamaForCausalLM w8a8 0 0 0 0 0 NotImplementedError
vllm-ascend compressed-tensors LlamaForCausalLM w8a8-dynamic 23 35 0 0 0 -
vllm-ascend compressed-tensors LlamaForCausalLM w8a8-static 0 0 0 0 0 NotImplementedError
vllm-ascend compressed-tensors MistralForCausalLM w8a8 0 0 0 0 0 NotImplementedError
vllm-ascend compressed-tensors MistralForCausalLM w8a8-dynamic 23 35 0 0 0 -
vllm-ascend compressed-tensors MistralForCausalLM w8a8-static 0 0 0 0 0 NotImplementedError
vllm-ascend compressed-tensors Qwen2ForCausalLM w8a8 0 0 0 0 0 NotImplementedError
vllm-ascend compressed-tensors Qwen2ForCausalLM w8a8-dynamic 25 41 0 0 0 -
vllm-ascend compressed-tensors Qwen2ForCausalLM w8a8-static 0 0 0 0 0 NotImplementedError
vllm-ascend compressed-tensors Qwen3ForCausalLM w8a8 0 0 0 0 0 NotImplementedError
vllm-ascend compressed-tensors Qwen3ForCausalLM w8a8-dynamic 27 39 0 0 0 -
vllm-ascend compressed-tensors Qwen3ForCausalLM w8a8-static 0 0 0 0 0 NotImplementedError
vllm-ascend compressed-tensors TeleChat2ForCausalLM w8a8 0 0 0 0 0 KeyError
vllm-ascend compressed-tensors TeleChat2ForCausalLM w8a8-dynamic 27 35 0 0 0 -
vllm-ascend compressed-tensors TeleChat2ForCausalLM w8a8-static 0 0 0 0 0 KeyError
vllm-mindspore golden-stick DeepseekV3ForCausalLM w8a8 57 115 0 0 0 -
vllm-mindspore golden-stick DeepseekV3ForCausalLM w8a8-dynamic 39 91 0 0 0 -
vllm-mindspore golden-stick Glm4MoeForCausalLM w8a8 25 53 4 66 38 -
vllm-mindspore golden-stick Glm4MoeForCausalLM w8a8-dynamic 25 53 4 42 38 -
vllm-mindspore golden-stick Glm4MoeForCausalLM w8a8-static 25 53 4 52 12 -
vllm-mindspore golden-stick LlamaForCausalLM w8a8 0 0 0 0 0 ValueError
vllm-mindspore golden-stick LlamaForCausalLM w8a8-dynamic 0 0 0 0 0 ValueError
vllm-mindspore golden-stick LlamaForCausalLM w8a8-static 30 60 0 0 0 -
vllm-mindspore golden-stick Qwen2ForCausalLM w8a8 17 27 0 38 14 -
vllm-mindspore golden-stick Qwen2ForCausalLM w8a8-dynamic 17 27 0 14 14 -
vllm-mindspore golden-stick Qwen2ForCausalLM w8a8-static 30 60 0 0 0 -
vllm-mindspore golden-stick Qwen3ForCausalLM w8a8 39 57 4 6 0 -
vllm-mindspore golden-stick Qwen3ForCausalLM w8a8-dynamic 27 25 8 14 0 -
vllm-mindspore golden-stick Qwen3ForCausalLM w8a8-static 30 60 0 0 0 -
vllm-mindspore golden-stick Qwen3MoeForCausalLM w8a8 21 69 0 80 56 -
vllm-mindspore golden-stick Qwen3MoeForCausalLM w8a8-dynamic 21 69 0 56 56 -
vllm-mindspore golden-stick Qwen3MoeForCausalLM w8a8-static 21 69 0 32 8 -
vllm-mindspore golden-stick TeleChat2ForCausalLM w8a8 39 37 10 16 0 -
vllm-mindspore golden-stick TeleChat2ForCausalLM w8a8-dynamic 27 21 10 14 0 -
vllm-mindspore golden-stick TeleChat2ForCausalLM w8a8-static 43 53 6 10 0 -
"""


def _parse(line: str) -> Reading:
    runtime, format, architecture, scheme, *counts, error = line.split()
    return Reading(runtime, format, architecture, scheme, Counts(*map(int, counts)), "" if error == "-" else error)


READINGS = tuple(map(_parse, _ROWS.splitlines()))
