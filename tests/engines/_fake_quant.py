"""For an interpreter that has mindspore-gs: a checkpoint in mindspore-gs's own fake-quantized network.

    python _fake_quant.py JOB.json

The job: model (a float model that MindOne can load), policies, quantized (a folder of safetensors), ids ([[int]]), and
where to save the logits. Prints, as JSON, the names of parameters that were missing and that nobody wanted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    import mindspore

    mindspore.set_device("CPU")
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    from mindspore_gs.ptq.models.auto_model import AutoQuantForCausalLM
    from mindspore_gs.ptq.models.mindone_models import mindone_model

    from qtool.engines.golden_stick import config, cpu, mindone
    from qtool.engines.golden_stick.tasks import LayerPolicy

    cpu.provide()
    mindone.register()
    load = mindone_model.load_param_into_net
    found: dict[str, Any] = {}

    def keep(network: Any, parameters: Any) -> Any:
        missing, unexpected = load(network, parameters)
        found.update(missing=list(missing), unexpected=list(unexpected), given=len(parameters))
        return missing, unexpected

    mindone_model.load_param_into_net = keep  # mindspore-gs only logs what it returns
    model = AutoQuantForCausalLM.from_pretrained(job["model"])
    model.fake_quant(
        config.network(), config.layer_policies([LayerPolicy(**policy) for policy in job["policies"]]), job["quantized"]
    )
    output = model.network(input_ids=mindspore.Tensor(job["ids"], mindspore.int32), use_cache=False)
    logits = output[0] if isinstance(output, tuple) else output.logits
    np.save(job["logits"], logits.asnumpy())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
