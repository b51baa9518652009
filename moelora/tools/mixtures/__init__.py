"""Mixtures that other projects saved, as adapted moelora models.

    model = import_mixture(base_model, "out/xlora")
    moelora.save(model, "out/imported")

One file per format: ``peft_xlora`` (PEFT), ``xlora`` (the package of X-LoRA's authors), ``mixlora`` (MixLoRA and
MoE-PEFT), ``meteora``.
"""

from moelora.tools.mixtures.read import import_mixture as import_mixture
