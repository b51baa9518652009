"""Exporting an adapted model for tools that know no routers: PEFT, transformers, vLLM.

    export_peft     every expert a plain PEFT LoRA
    export_merged   the base model with the experts merged into its weights; gates must not depend on the token
    export_lora     one plain PEFT LoRA: exact where gates do not depend on the token, else near; how near is measured
    export_vllm     LoRAs within vLLM's limits

All write a new folder, whole or not at all, end with a check of what was written against the model, and leave the model
as it was. ``moelora.train.export`` does the same for the folder of a run.
"""

from moelora.tools.export.folder import Export as Export
from moelora.tools.export.kinds import VLLM_RANKS as VLLM_RANKS
from moelora.tools.export.kinds import export_dense as export_dense
from moelora.tools.export.kinds import export_lora as export_lora
from moelora.tools.export.kinds import export_merged as export_merged
from moelora.tools.export.kinds import export_peft as export_peft
from moelora.tools.export.kinds import export_vllm as export_vllm
