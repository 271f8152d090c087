"""The bundle: a trained model as one folder that needs neither its run nor DeepSpeed.

    config.json                      the RunConfig, and the size of the vocabulary
    tokenizer.model|.json            the tokenizer
    backbone-00001-of-00002.safetensors ...   weights in shards per part (also gistnet, lensnet)
    manifest.json                    step, source, parameters and their files, SHA-256 of every file
    README.md                        a model card

Parameters are named as in `MegaContextModel.state_dict()`, with the prefix `lensnet.` for
LensNet's. Tied weights are stored once. A bundle of a plain language model
(`mc.num_random_variants` = 0) has neither GistNet nor LensNet.
"""

from mc_ds.weights.bundle.read import Bundle, is_bundle, open_bundle
from mc_ds.weights.bundle.write import BundleWriter
from mc_ds.weights.layout import DtypeName

__all__ = ["Bundle", "BundleWriter", "DtypeName", "is_bundle", "open_bundle"]
