# SPDX-License-Identifier: Apache-2.0
"""Tiny NeMo ASR models of every kind, made from their own classes: transducers, hybrids, Canary, CTC on characters."""

from pathlib import Path

from nemo.collections.asr.models import EncDecCTCModel, EncDecMultiTaskModel
from nemo.collections.common.tokenizers.canary_tokenizer import CanaryTokenizer
from nemo.utils import AppState
from omegaconf import OmegaConf, open_dict

from nemo_mtbi.encoders.ctc import write_tokenizer
from nemo_mtbi.testing import WORDS, tiny_asr_config

LETTERS = [" ", *"abcdefghijklmnopqrstuvwxyz", "'"]
_RNNT = {
    "decoder": {
        "_target_": "nemo.collections.asr.modules.RNNTDecoder",
        "normalization_mode": None,
        "random_state_sampling": False,
        "blank_as_pad": True,
        "prednet": {"pred_hidden": 8, "pred_rnn_layers": 1, "t_max": None, "dropout": 0.0},
    },
    "joint": {
        "_target_": "nemo.collections.asr.modules.RNNTJoint",
        "log_softmax": None,
        "fuse_loss_wer": False,
        "jointnet": {"joint_hidden": 8, "activation": "relu", "dropout": 0.0},
    },
    "model_defaults": {"enc_hidden": 16, "pred_hidden": 8, "joint_hidden": 8},
    "decoding": {"strategy": "greedy_batch", "greedy": {"max_symbols": 5}},
    "loss": {"loss_name": "default"},
}
_TRANSFORMER = dict(hidden_size=16, inner_size=16, num_layers=1, num_attention_heads=2, ffn_dropout=0.0)
_TRANSFORMER |= dict(attn_score_dropout=0.0, attn_layer_dropout=0.0, hidden_act="relu", pre_ln=True)


def transducer(kind, folder, **encoder):
    """``EncDecRNNTBPEModel``, or the hybrid of transducer and CTC."""
    config = tiny_asr_config(write_tokenizer(folder, WORDS, 64), **encoder)
    with open_dict(config):
        head = config.pop("decoder")
        config = OmegaConf.merge(config, _RNNT)
        config.aux_ctc = {"ctc_loss_weight": 0.3, "decoder": head, "decoding": {"strategy": "greedy_batch"}}
    return kind(config).eval()


def characters():
    """CTC without a tokenizer."""
    config = tiny_asr_config("unused")
    with open_dict(config):
        config.pop("tokenizer")
        config.decoder.vocabulary, config.decoder.num_classes = LETTERS, len(LETTERS)
        config.labels = LETTERS
    return EncDecCTCModel(config).eval()


def canary(folder):
    """An attention encoder-decoder with task prompts."""
    folder = Path(folder)
    config = tiny_asr_config("unused")
    special = folder / "special"
    special.mkdir(parents=True)
    tokens = ["translate", "transcribe", "en", "de", "pnc", "nopnc", "noaudio", "spkchange"]
    CanaryTokenizer.build_special_tokenizer(tokens, str(special))
    english = write_tokenizer(folder / "en", WORDS, 64)
    with open_dict(config):
        config.pop("decoder"), config.pop("optim")
        config.tokenizer = {
            "dir": None,
            "type": "agg",
            "langs": {
                "spl_tokens": {"dir": str(special), "type": "bpe"},
                "en": {"dir": str(english), "type": "bpe"},
            },
            "custom_tokenizer": {
                "_target_": "nemo.collections.common.tokenizers.canary_tokenizer.CanaryTokenizer",
                "tokenizers": None,
            },
        }
        config.prompt_format = "canary"
        config.model_defaults = {"asr_enc_hidden": 16, "lm_enc_hidden": 16, "lm_dec_hidden": 16}
        config.transf_encoder = {
            "_target_": "nemo.collections.asr.modules.transformer.transformer_encoders.TransformerEncoder",
            **_TRANSFORMER,
            "num_layers": 0,
            "mask_future": False,
            "pre_ln_final_layer_norm": True,
        }
        config.transf_decoder = {
            "_target_": "nemo.collections.asr.modules.transformer.get_nemo_transformer",
            "model_name": None,
            "pretrained": False,
            "encoder": None,
            "pre_ln_final_layer_norm": True,
            "config_dict": {
                **_TRANSFORMER,
                "max_sequence_length": 64,
                "num_token_types": 0,
                "embedding_dropout": 0.0,
                "learn_positional_encodings": False,
                "vocab_size": "None",
            },
        }
        config.head = {
            "_target_": "nemo.collections.asr.parts.submodules.token_classifier.TokenClassifier",
            "num_layers": 1,
            "activation": "relu",
            "log_softmax": True,
            "hidden_size": 16,
            "num_classes": "None",
            "dropout": 0.0,
            "use_transformer_init": True,
        }
        config.decoding = {"strategy": "beam", "return_best_hypothesis": True, "beam": {"beam_size": 1}}
        config.loss = {
            "_target_": "nemo.collections.common.losses.smoothed_cross_entropy.SmoothedCrossEntropyLoss",
            "label_smoothing": 0.0,
            "pad_id": None,
        }
    AppState().model_restore_path = None  # else it looks for more of itself in the last file that was restored
    return EncDecMultiTaskModel(config).eval()
