"""The keys of a GGUF file: what the model is called, how it is built, how it reads text.

They are those that llama.cpp's converter writes for Phi-3, in its order; docs/gguf.md lists where
they differ and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.checkpoint.json_object import read_json_object
from phiconv.checkpoint.licence import recognised_licence
from phiconv.errors import StageError
from phiconv.gguf.file_types import FILE_TYPES, FileTypeName
from phiconv.gguf.vocabulary import Vocabulary

if TYPE_CHECKING:
    import gguf

    from phiconv.checkpoint import Checkpoint, ModelConfig
    from phiconv.gguf.importance import ImportanceMatrix
    from phiconv.gguf.special_tokens import SpecialTokens

ARCHITECTURE = "phi3"
HUB = "https://huggingface.co"

# generation_config.json -> attribute of gguf.Metadata
_SAMPLING = {
    "top_k": "sampling_top_k",
    "top_p": "sampling_top_p",
    "min_p": "sampling_min_p",
    "temperature": "sampling_temp",
    "repetition_penalty": "sampling_penalty_repeat",
}


@dataclass(frozen=True)
class Naming:
    """What a recipe says about the model; what it leaves out is taken from the checkpoint.

    Attributes:
        name: `general.name`.
        license: SPDX identifier in lower case.
        base_model: Hub id of the model that this one was made from.
    """

    name: str | None = None
    license: str | None = None
    base_model: str | None = None


def model_name(naming: Naming, checkpoint: Checkpoint, vocabulary: Vocabulary) -> str:
    """`general.name`: as the recipe has it, else as config.json, else `Phi3`.

    llama.cpp strips white space after special tokens, as Phi-3's tokenizer does, only where this
    name holds `phi-3` or `phi3`, and never loads other vocabularies under such a name.

    Raises:
        StageError: The recipe's name would make llama.cpp read text in another way.
    """
    if naming.name is not None:
        if _says_phi3(naming.name) != vocabulary.is_stripping:
            must = "must" if vocabulary.is_stripping else "must not"
            raise StageError(
                f"the name {naming.name!r} {must} hold 'phi-3' or 'phi3': by that llama.cpp "
                "decides whether white space after special tokens is stripped, and this tokenizer "
                f"{'does' if vocabulary.is_stripping else 'does not'}",
                where="convert-gguf: name",
            )
        return naming.name
    default = "Phi3" if vocabulary.is_stripping else "Phi"
    known = str(checkpoint.raw_config.get("_name_or_path") or "")
    name = known.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return name if name and _says_phi3(name) == vocabulary.is_stripping else default


def _says_phi3(name: str) -> bool:
    return "phi-3" in name.lower() or "phi3" in name.lower()


def gguf_metadata(
    checkpoint: Checkpoint,
    naming: Naming,
    vocabulary: Vocabulary,
    special: SpecialTokens,
    *,
    file_type: FileTypeName,
    parameters: int,
    importance: ImportanceMatrix | None = None,
) -> gguf.GGUFWriter:
    """Every key of the file, in a writer that has no tensor yet.

    Args:
        checkpoint: The model.
        naming: What the recipe says about it.
        vocabulary: Its tokens.
        special: Which of them mean something.
        file_type: The kind of file.
        parameters: How many numbers it holds.
        importance: What the quantizers weigh columns by.

    Raises:
        StageError: The name is one under which llama.cpp would read text in another way.
    """
    import gguf

    from phiconv.gguf.key_values import KeyValueWriter

    writer = KeyValueWriter(path=None, arch=ARCHITECTURE)
    writer.add_type(gguf.GGUFType.MODEL)
    name = model_name(naming, checkpoint, vocabulary)
    general = _general(name, naming, checkpoint, parameters)
    general.set_gguf_meta_model(writer)
    _add_architecture(writer, checkpoint.config)
    _add_vocabulary(writer, vocabulary)
    _add_special_tokens(writer, special)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[file_type].number)
    if importance is not None:
        writer.add_string("quantize.imatrix.dataset", ", ".join(importance.datasets))
        writer.add_uint32("quantize.imatrix.entries_count", len(importance.sums))
        writer.add_uint32("quantize.imatrix.chunks_count", importance.chunks)
    return writer


def _general(name: str, naming: Naming, checkpoint: Checkpoint, parameters: int) -> gguf.Metadata:
    import gguf

    _, _, basename, finetune, version, _ = gguf.Metadata.get_model_id_components(name, parameters)
    licence = naming.license or _licence(checkpoint)
    return gguf.Metadata(
        **_sampling(checkpoint.path),
        name=name,
        basename=basename,
        finetune=finetune,
        version=version,
        size_label=gguf.size_label(parameters, parameters, 0, 0),
        license=licence,
        base_models=[_base_model(naming.base_model)] if naming.base_model else None,
    )


def _sampling(folder: Path) -> dict[str, Any]:
    """How the model's maker samples from it, which llama.cpp takes for defaults."""
    path = folder / "generation_config.json"
    config = read_json_object(path) if path.is_file() else {}
    found = {name: config.get(key) for key, name in _SAMPLING.items()}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def _licence(checkpoint: Checkpoint) -> str | None:
    """The SPDX identifier of the licence file that lies beside the weights, if it is known."""
    for file in checkpoint.files:
        if Path(file).stem.upper() in ("LICENSE", "LICENCE"):
            text = (checkpoint.path / file).read_text(encoding="utf-8", errors="replace")
            return recognised_licence(text)
    return None


def _base_model(hub_id: str) -> dict[str, str]:
    organization, _, name = hub_id.rpartition("/")
    entry = {"name": name, "repo_url": f"{HUB}/{hub_id}"}
    return entry | ({"organization": organization} if organization else {})


def architecture_values(config: ModelConfig) -> dict[str, int | float]:
    """The keys that say how the model is built, `phi3.…`, with the values of a configuration."""
    from phiconv.gguf.key_values import KeyValueWriter

    writer = KeyValueWriter(path=None, arch=ARCHITECTURE)
    _add_architecture(writer, config)
    (values,) = writer.kv_data
    prefix = f"{ARCHITECTURE}."
    return {key: entry.value for key, entry in values.items() if key.startswith(prefix)}


def _add_architecture(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    if config.rope is not None:
        writer.add_rope_scaling_attn_factors(config.rope.attention_factor)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope_theta)
    # 0 is how llama.cpp tells Phi-4 from Phi-3
    writer.add_sliding_window(config.sliding_window or 0)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(list(map(int, vocabulary.types)))
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)


def _add_special_tokens(writer: gguf.GGUFWriter, special: SpecialTokens) -> None:
    import gguf

    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "eot": writer.add_eot_token_id,
        "unk": writer.add_unk_token_id,
        "sep": writer.add_sep_token_id,
        "pad": writer.add_pad_token_id,
        "mask": writer.add_mask_token_id,
    }
    for kind, token in special.ids.items():
        if kind in add:
            add[kind](token)
    writer.add_add_bos_token(special.add_bos)
    writer.add_add_eos_token(special.add_eos)
    if special.chat_template is not None:
        writer.add_chat_template(special.chat_template)
    # gguf's own way with several templates gives another order in every process
    for name, template in sorted(special.more_templates.items()):
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), template)
    writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, sorted(special.more_templates))
