"""The catalogue of the model matrix: small configurations of the architectures people have, with random weights.

An entry builds its model and makes the inputs of one call, the same each time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        name: library:model. kind: what it is for. build: makes it, from torch's generator alone.
        inputs: makes the arguments of one call.
        targets: makes those of a call in training mode, where that takes more (detection, whose losses it returns).
        own_head: its task has a copy of the base's head, although one of another size could be made.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Call]
    targets: Callable[[], Call] | None = None
    own_head: bool = False


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def images(size: int = 64, *shape: int, key: str | None = None) -> Callable[[], Call]:
    """Two images (or what has further dimensions before the last two); `key`: the argument's name."""
    return values(2, *(shape or (3,)), size, size, key=key)


def values(*shape: int, key: str | None = None, **more: Any) -> Callable[[], Call]:
    def make() -> Call:
        x = torch.randn(shape, generator=generator())
        return ((), {key: x, **more}) if key else ((x,), more)

    return make


def text(length: int = 9, vocabulary: int = 99, **more: Any) -> Callable[[], Call]:
    def make() -> Call:
        ids = torch.randint(4, vocabulary, (2, length), generator=generator())
        return (), {
            "input_ids": ids,
            **{key: ids.clone() if value is ids_too else value for key, value in more.items()},
        }

    return make


ids_too: Any = object()  # an argument that takes the same tokens: a decoder's


# -- timm


def timm(name: str, size: int = 64, *, kind: str = "classification", call: Any = None, **settings: Any) -> Entry:
    """`name`: what `create_model` takes, or module.Class, which takes settings that `create_model` does not."""

    def build() -> nn.Module:
        module, _, cls = name.rpartition(".")
        library: Any = importlib.import_module(f"timm.models.{module}" if module else "timm")
        model: nn.Module = getattr(library, cls)(**settings) if module else library.create_model(name, **settings)
        return model

    return Entry(f"timm:{name.rpartition('.')[2]}", kind, build, call or images(size))


VIT = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 32, "patch_size": 8}

TIMM = (
    timm("resnet18"),
    timm("seresnet18"),
    timm("skresnet18"),
    timm("resnest14d"),
    timm("resnetv2_18"),
    timm("res2net50_26w_4s", layers=(1, 1, 1, 1)),
    timm("densenet121", block_config=(2, 2, 2, 2)),
    timm("dla46_c"),
    timm("dpn48b"),
    timm("vgg.VGG", 32, cfg=[8, "M", 16, "M", 32, "M", 32, "M"], mlp_ratio=0.1, norm_layer=nn.BatchNorm2d),
    timm("cs3darknet_s"),
    timm("hrnet_w18_small", 64),
    timm("regnety_002"),
    timm("nf_regnet_b0"),
    timm("mobilenetv2_050"),
    timm("mobilenetv3_small_050"),
    timm("mobilenetv4_conv_small"),
    timm("efficientnet_b0"),
    timm("tf_efficientnet_lite0"),
    timm("mixnet_s"),
    timm("mnasnet_small"),
    timm("ghostnet_050"),
    timm("lcnet_035"),
    timm("rexnet_100"),
    timm("repvgg_a0"),
    timm("mobileone_s0"),
    timm("repvit_m0_9"),
    timm("repghostnet_050"),
    timm("starnet_s1"),
    timm("fasternet_t0"),
    timm("hgnetv2_b0"),
    timm("inception_v3", 96),
    timm("convnext_atto", depths=(1, 1, 1, 1)),
    timm("convnextv2_atto", depths=(1, 1, 1, 1)),
    timm("inception_next_atto", depths=(1, 1, 1, 1)),
    timm("convmixer.ConvMixer", dim=32, depth=2, kernel_size=7),
    timm("edgenext_xx_small"),
    timm("mambaout_femto", depths=(1, 1, 1, 1)),
    timm("poolformer_s12"),
    Entry("timm:caformer", "classification", lambda: caformer(), images()),
    timm("focalnet.FocalNet", depths=(1, 1, 1, 1), embed_dim=24),
    timm("coatnet_pico_rw_224", 64, img_size=64, depths=(1, 1, 1, 1), embed_dim=(16, 32, 32, 64), stem_width=16),
    timm("mobilevit_xxs"),
    timm("mobilevitv2_050"),
    timm("efficientformer_l1", 224),
    timm("efficientvit_b0"),
    timm("efficientvit_m0", 64, img_size=64),
    timm("fastvit_t8"),
    timm("vit_tiny_patch16_224", 32, **VIT),
    timm("vit_base_patch16_siglip_224", 32, **VIT),
    timm("vit_relpos_small_patch16_224", 32, **VIT),
    timm("deit_tiny_distilled_patch16_224", 32, **VIT),
    timm("deit3_small_patch16_224", 32, **VIT),
    timm("beit_base_patch16_224", 32, **VIT),
    timm("eva02_tiny_patch14_224", 32, **VIT),
    timm("cait_xxs24_224", 32, **VIT),
    timm("convit_tiny", 32, **VIT),
    timm("xcit_nano_12_p16_224", 64, img_size=64, depth=2, embed_dim=32),
    timm("naflexvit_base_patch16_gap", 64, embed_dim=32, depth=2, num_heads=4),
    timm("crossvit_tiny_240", 240),
    timm("volo.VOLO", 64, img_size=64, layers=(1, 1, 1, 1), embed_dims=(24, 48, 48, 48), num_heads=(2, 4, 4, 4)),
    timm("tnt_s_patch16_224", 64, img_size=64, embed_dim=48, depth=2, inner_dim=12),
    timm("pit_ti_224", 64, img_size=64),
    timm("levit_128s", 224),
    timm("visformer_tiny", 64, img_size=64),
    timm("pvt_v2_b0"),
    timm("twins_svt_small", 64, img_size=64, embed_dims=(16, 32, 64, 128), depths=(1, 1, 2, 1)),
    timm("swin_tiny_patch4_window7_224", 64, img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    timm("swinv2_tiny_window8_256", 64, img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    timm("swinv2_cr_tiny_224", 64, img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    timm("davit_tiny", 64, depths=(1, 1, 1, 1), embed_dims=(24, 48, 72, 96), num_heads=(2, 4, 6, 8)),
    timm("gcvit_xxtiny", 64, img_size=64),
    timm("nest.Nest", 64, img_size=64, embed_dims=(16, 32, 64), depths=(1, 1, 2), num_heads=(1, 2, 4), num_levels=3),
    timm("hiera_tiny_224", 64, img_size=(64, 64), embed_dim=24, stages=(1, 1, 1, 1)),
    timm("tiny_vit_5m_224", 64),
    timm("sequencer2d_s", 64, layers=(1, 1, 1, 1), embed_dims=(24, 48, 48, 48), hidden_sizes=(6, 12, 12, 12)),
    timm("mlp_mixer.MlpMixer", 64, img_size=64, embed_dim=32, num_blocks=2),
    timm("gmlp_ti16_224", 64, img_size=64),
    timm("resmlp_12_224", 64, img_size=64),
    timm("samvit_base_patch16_224", 64, img_size=64, embed_dim=32, depth=2, num_heads=4, global_attn_indexes=(1,)),
    timm("shvit_s1"),
    timm("swiftformer_xs"),
)


def caformer() -> nn.Module:
    former = importlib.import_module("timm.models.metaformer")
    model: nn.Module = former.MetaFormer(
        depths=(1, 1),
        dims=(16, 32),
        token_mixers=[former.SepConv, former.Attention],
        norm_layers=[former.LayerNorm2dNoBias, former.LayerNormNoBias],
    )
    return model


# -- torchvision


def vision(name: str, call: Any, kind: str = "classification", targets: Any = None, **settings: Any) -> Entry:
    """`name` is a path in torchvision.models: a function, or a class that takes settings."""

    def build() -> nn.Module:
        found: Any = importlib.import_module("torchvision").models
        for part in name.split("."):
            found = getattr(found, part)
        model: nn.Module = found(**settings)
        return model

    return Entry(f"torchvision:{name.rpartition('.')[2]}", kind, build, call, targets)


def pictures(size: int = 64) -> Callable[[], Call]:
    """Detection's: a list of images."""
    return lambda: (([*torch.rand(2, 3, size, size, generator=generator())],), {})


def boxed(size: int = 64, *, masks: bool = False) -> Callable[[], Call]:
    def make() -> Call:
        (found,), _ = pictures(size)()
        boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 60.0, 50.0]])
        target: dict[str, Tensor] = {"boxes": boxes, "labels": torch.tensor([1, 2])}
        if masks:
            target["masks"] = torch.zeros(2, size, size, dtype=torch.uint8)
            target["masks"][:, 12:40, 22:38] = 1
        return (found, [target, {key: value.clone() for key, value in target.items()}]), {}

    return make


FEW = {
    "box_score_thresh": 0.0,
    "box_detections_per_img": 8,
    "rpn_pre_nms_top_n_train": 20,
    "rpn_pre_nms_top_n_test": 20,
    "rpn_post_nms_top_n_train": 10,
    "rpn_post_nms_top_n_test": 10,
}


def resnet_fpn(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    """torchvision's detectors over a ResNet-18, which their own functions do not offer."""

    def build() -> nn.Module:
        detection = importlib.import_module("torchvision").models.detection
        backbone = detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=5
        )
        if kind.endswith("RCNN"):  # heads of a thousandth of the size
            ops = importlib.import_module("torchvision.ops")
            box = detection.faster_rcnn
            settings["box_roi_pool"] = ops.MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=2, sampling_ratio=2)
            settings["box_head"] = box.TwoMLPHead(backbone.out_channels * 4, 32)
            settings["box_predictor"] = box.FastRCNNPredictor(32, 5)
        if kind == "MaskRCNN":
            settings["mask_predictor"] = detection.mask_rcnn.MaskRCNNPredictor(backbone.out_channels, 16, 5)
        classes = {} if kind.endswith("RCNN") else {"num_classes": 5}
        model: nn.Module = getattr(detection, kind)(backbone, min_size=64, max_size=64, **classes, **settings)
        return model

    return build


TORCHVISION = (
    vision("resnet18", images()),
    vision("resnext50_32x4d", images()),
    vision("densenet.DenseNet", images(), block_config=(2, 2, 2, 2)),
    vision("squeezenet1_1", images()),
    vision("googlenet", images(), init_weights=False),
    vision("inception_v3", images(299), init_weights=False),
    vision("shufflenet_v2_x0_5", images()),
    vision("mobilenet_v2", images()),
    vision("mobilenet_v3_small", images()),
    vision("mnasnet0_5", images()),
    vision("efficientnet_b0", images()),
    vision("regnet_y_400mf", images()),
    vision("convnext_tiny", images(32)),
    vision(
        "vision_transformer.VisionTransformer",
        images(32),
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
    ),
    vision(
        "swin_transformer.SwinTransformer",
        images(64),
        patch_size=[4, 4],
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
    ),
    Entry(
        "torchvision:swin_transformer_v2",
        "classification",
        lambda: swin_v2(),
        images(64),
    ),
    vision(
        "maxvit.MaxVit",
        images(64),
        input_size=(64, 64),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.1,
    ),
    vision("segmentation.fcn_resnet50", images(32), "segmentation", weights=None, weights_backbone=None, num_classes=5),
    vision(
        "segmentation.deeplabv3_mobilenet_v3_large",
        images(),
        "segmentation",
        weights=None,
        weights_backbone=None,
        num_classes=5,
        aux_loss=True,
    ),
    vision(
        "segmentation.lraspp_mobilenet_v3_large",
        images(),
        "segmentation",
        weights=None,
        weights_backbone=None,
        num_classes=5,
    ),
    Entry(
        "torchvision:fasterrcnn",
        "detection",
        resnet_fpn("FasterRCNN", **FEW),
        pictures(),
        boxed(),
    ),
    Entry(
        "torchvision:maskrcnn",
        "detection",
        resnet_fpn("MaskRCNN", **FEW),
        pictures(),
        boxed(masks=True),
    ),
    Entry("torchvision:retinanet", "detection", resnet_fpn("RetinaNet", score_thresh=0.0), pictures(), boxed()),
    Entry("torchvision:fcos", "detection", resnet_fpn("FCOS", score_thresh=0.0), pictures(), boxed()),
    vision(
        "detection.ssdlite320_mobilenet_v3_large",
        pictures(),
        "detection",
        boxed(),
        weights=None,
        weights_backbone=None,
        num_classes=5,
        score_thresh=0.0,
    ),
    vision("video.r3d_18", values(2, 3, 4, 32, 32), "video"),
    vision("video.mc3_18", values(2, 3, 4, 32, 32), "video"),
    vision(
        "video.swin_transformer.SwinTransformer3d",
        values(2, 3, 4, 32, 32),
        "video",
        patch_size=[2, 4, 4],
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[2, 4, 4],
    ),
)


def swin_v2() -> nn.Module:
    swin = importlib.import_module("torchvision.models.swin_transformer")
    model: nn.Module = swin.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        block=swin.SwinTransformerBlockV2,
        downsample_layer=swin.PatchMergingV2,
    )
    return model


# -- transformers


def hugging(
    name: str,
    kind: str,
    call: Any,
    targets: Any = None,
    nested: dict[str, tuple[str, dict[str, Any]]] | None = None,
    own_head: bool = False,
    **settings: Any,
) -> Entry:
    """`nested`: settings that are configurations themselves, by the name of their class."""

    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        cls = getattr(transformers, name)
        made = {key: getattr(transformers, inner)(**given) for key, (inner, given) in (nested or {}).items()}
        model: nn.Module = cls(cls.config_class(**settings, **made))
        return model

    return Entry(f"transformers:{name}", kind, build, call, targets, own_head)


SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CAUSAL = {**SMALL, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}
SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "use_cache": False,
}
PATCHES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SPEECH = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
WAVE = values(2, 800)
DECODED = text(decoder_input_ids=ids_too)
PIXELS = {"key": "pixel_values"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
BACKBONE = {
    "embedding_size": 16,
    "hidden_sizes": [16, 24, 32, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 6,
    "num_labels": 5,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}


def labelled(size: int = 64) -> Callable[[], Call]:
    """DETR's arguments in training: boxes in shares of the image."""

    def make() -> Call:
        x = torch.randn(2, 3, size, size, generator=generator())
        boxes = torch.tensor([[0.4, 0.4, 0.3, 0.2], [0.6, 0.5, 0.2, 0.4]])
        given = [{"class_labels": torch.tensor([1, 2]), "boxes": boxes.to(torch.get_default_dtype())} for _ in range(2)]
        return (), {"pixel_values": x, "labels": given}

    return make


TRANSFORMERS = (
    hugging(
        "GPT2LMHeadModel",
        "text",
        text(),
        vocab_size=99,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        use_cache=False,
    ),
    hugging(
        "GPT2ForSequenceClassification",
        "text",
        text(),
        vocab_size=99,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        use_cache=False,
        pad_token_id=0,
    ),
    hugging("LlamaForCausalLM", "text", text(), **CAUSAL),
    hugging("LlamaForSequenceClassification", "text", text(), **CAUSAL),
    hugging("MistralForCausalLM", "text", text(), **CAUSAL),
    hugging("Qwen2ForCausalLM", "text", text(), **CAUSAL),
    hugging("Qwen3ForCausalLM", "text", text(), **CAUSAL, head_dim=8),
    hugging("GemmaForCausalLM", "text", text(), **CAUSAL, head_dim=8),
    hugging("Gemma2ForCausalLM", "text", text(), **CAUSAL, head_dim=8),
    hugging("Phi3ForCausalLM", "text", text(), **CAUSAL),
    hugging("OlmoForCausalLM", "text", text(), **CAUSAL),
    hugging("GPTNeoXForCausalLM", "text", text(), **SMALL, use_cache=False),
    hugging(
        "GPTJForCausalLM",
        "text",
        text(),
        vocab_size=99,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        use_cache=False,
    ),
    hugging(
        "OPTForCausalLM",
        "text",
        text(),
        vocab_size=99,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        use_cache=False,
    ),
    hugging("BloomForCausalLM", "text", text(), vocab_size=99, hidden_size=32, n_layer=2, n_head=4, use_cache=False),
    hugging(
        "FalconForCausalLM",
        "text",
        text(),
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
    ),
    hugging("MixtralForCausalLM", "text", text(), **CAUSAL, num_local_experts=4, num_experts_per_tok=2),
    hugging("Qwen2MoeForCausalLM", "text", text(), **CAUSAL, **EXPERTS, shared_expert_intermediate_size=24),
    hugging("Qwen3MoeForCausalLM", "text", text(), **CAUSAL, **EXPERTS, head_dim=8),
    hugging("GptOssForCausalLM", "text", text(), **CAUSAL, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    hugging("OlmoeForCausalLM", "text", text(), **CAUSAL, num_experts=4, num_experts_per_tok=2),
    hugging(
        "DeepseekV3ForCausalLM",
        "text",
        text(),
        **{**CAUSAL, "num_key_value_heads": 4},
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    Entry("transformers:SwitchTransformers", "text", lambda: switch(), DECODED),
    hugging(
        "MambaForCausalLM",
        "text",
        text(),
        vocab_size=99,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        use_cache=False,
    ),
    hugging(
        "Mamba2ForCausalLM",
        "text",
        text(),
        vocab_size=99,
        hidden_size=32,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        num_hidden_layers=2,
        chunk_size=8,
        use_cache=False,
    ),
    hugging("RwkvForCausalLM", "text", text(), vocab_size=99, hidden_size=32, num_hidden_layers=2, use_cache=False),
    hugging("BertForSequenceClassification", "text", text(), **SMALL),
    hugging(
        "BertForMaskedLM",
        "text",
        text(),
        **SMALL,
    ),
    hugging("BertForTokenClassification", "text", text(), **SMALL),
    hugging("RobertaForSequenceClassification", "text", text(), **SMALL),
    hugging(
        "DistilBertForSequenceClassification",
        "text",
        text(),
        vocab_size=99,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
    ),
    hugging("AlbertForSequenceClassification", "text", text(), **SMALL, embedding_size=16),
    hugging("ElectraForSequenceClassification", "text", text(), **SMALL, embedding_size=16),
    hugging(
        "DebertaV2ForSequenceClassification",
        "text",
        text(),
        **SMALL,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
    ),
    hugging("MPNetForSequenceClassification", "text", text(), **SMALL),
    hugging("ModernBertForSequenceClassification", "text", text(), **SMALL, pad_token_id=0),
    hugging(
        "XLNetForSequenceClassification", "text", text(), vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48
    ),
    hugging(
        "FNetForSequenceClassification",
        "text",
        text(),
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        max_position_embeddings=64,
    ),
    hugging("SqueezeBertForSequenceClassification", "text", text(), **SMALL, embedding_size=32),
    hugging(
        "T5ForConditionalGeneration",
        "text",
        DECODED,
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        use_cache=False,
    ),
    hugging(
        "T5EncoderModel",
        "text",
        text(),
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
    ),
    hugging(
        "BartForConditionalGeneration",
        "text",
        DECODED,
        own_head=True,
        **SEQ2SEQ,
    ),
    hugging(
        "BartForSequenceClassification",
        "text",
        lambda: bart_text(),
        **SEQ2SEQ,
    ),
    hugging(
        "MarianMTModel",
        "text",
        DECODED,
        own_head=True,
        **SEQ2SEQ,
        pad_token_id=1,
        decoder_start_token_id=1,
    ),
    hugging("ViTForImageClassification", "classification", images(32, **PIXELS), **PATCHES),
    hugging("DeiTForImageClassificationWithTeacher", "classification", images(32, **PIXELS), **PATCHES),
    hugging("BeitForImageClassification", "classification", images(32, **PIXELS), **PATCHES),
    hugging("Dinov2ForImageClassification", "classification", images(32, **PIXELS), **PATCHES),
    hugging(
        "ResNetForImageClassification",
        "classification",
        images(**PIXELS),
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
    ),
    hugging(
        "RegNetForImageClassification",
        "classification",
        images(**PIXELS),
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        groups_width=8,
    ),
    hugging(
        "ConvNextForImageClassification",
        "classification",
        images(**PIXELS),
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
    ),
    hugging(
        "ConvNextV2ForImageClassification",
        "classification",
        images(**PIXELS),
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
    ),
    hugging(
        "SwinForImageClassification",
        "classification",
        images(32, **PIXELS),
        image_size=32,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        patch_size=2,
    ),
    hugging(
        "Swinv2ForImageClassification",
        "classification",
        images(32, **PIXELS),
        image_size=32,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        patch_size=2,
    ),
    hugging(
        "MobileViTForImageClassification",
        "classification",
        images(**PIXELS),
        image_size=64,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 48],
        num_attention_heads=4,
    ),
    hugging("MobileNetV1ForImageClassification", "classification", images(**PIXELS), depth_multiplier=0.25),
    hugging(
        "PoolFormerForImageClassification",
        "classification",
        images(**PIXELS),
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
    ),
    hugging(
        "PvtForImageClassification",
        "classification",
        images(**PIXELS),
        image_size=64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
    ),
    hugging(
        "CvtForImageClassification",
        "classification",
        images(**PIXELS),
        embed_dim=[8, 16, 24],
        num_heads=[1, 2, 4],
        depth=[1, 2, 3],
    ),
    hugging(
        "FocalNetForImageClassification",
        "classification",
        images(**PIXELS),
        image_size=64,
        embed_dim=16,
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        hidden_sizes=[16, 32],
    ),
    hugging(
        "SegformerForSemanticSegmentation",
        "segmentation",
        images(**PIXELS),
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
        num_labels=5,
    ),
    hugging(
        "BeitForSemanticSegmentation",
        "segmentation",
        images(32, **PIXELS),
        **{**PATCHES, "num_hidden_layers": 4},
        out_indices=[1, 2, 3, 4],
        num_labels=5,
        auxiliary_num_convs=1,
        auxiliary_channels=16,
    ),
    hugging(
        "UperNetForSemanticSegmentation",
        "segmentation",
        images(**PIXELS),
        nested={
            "backbone_config": (
                "ConvNextConfig",
                {
                    "hidden_sizes": [16, 24, 32, 48],
                    "depths": [1, 1, 1, 1],
                    "out_features": ["stage1", "stage2", "stage3", "stage4"],
                },
            )
        },
        hidden_size=16,
        auxiliary_in_channels=32,
        auxiliary_channels=16,
        num_labels=5,
    ),
    hugging(
        "DPTForSemanticSegmentation",
        "segmentation",
        images(32, **PIXELS),
        **{**PATCHES, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16,
        num_labels=5,
    ),
    hugging(
        "DPTForDepthEstimation",
        "depth",
        images(32, **PIXELS),
        **{**PATCHES, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16,
    ),
    hugging(
        "GLPNForDepthEstimation",
        "depth",
        images(**PIXELS),
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
    ),
    hugging(
        "DetrForObjectDetection",
        "detection",
        images(**PIXELS),
        labelled(),
        nested={"backbone_config": ("ResNetConfig", BACKBONE)},
        **DETR,
    ),
    hugging(
        "ConditionalDetrForObjectDetection",
        "detection",
        images(**PIXELS),
        labelled(),
        nested={"backbone_config": ("ResNetConfig", BACKBONE)},
        **DETR,
    ),
    hugging(
        "YolosForObjectDetection",
        "detection",
        images(32, **PIXELS),
        labelled(32),
        **{**PATCHES, "image_size": [32, 32]},
        num_detection_tokens=6,
        num_labels=5,
    ),
    hugging(
        "WhisperForConditionalGeneration",
        "audio",
        lambda: spoken(),
        **{**SEQ2SEQ, "max_position_embeddings": 64},
        max_source_positions=20,
        max_target_positions=32,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    hugging(
        "WhisperForAudioClassification",
        "audio",
        values(2, 8, 40, key="input_features"),
        **SEQ2SEQ,
        max_source_positions=20,
        max_target_positions=32,
        num_mel_bins=8,
        classifier_proj_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    hugging("Wav2Vec2ForCTC", "audio", WAVE, **SPEECH),
    hugging("Wav2Vec2ForSequenceClassification", "audio", WAVE, **SPEECH, classifier_proj_size=16),
    hugging("HubertForSequenceClassification", "audio", WAVE, **SPEECH, classifier_proj_size=16),
    hugging("WavLMForSequenceClassification", "audio", WAVE, **SPEECH, classifier_proj_size=16),
    hugging("Data2VecAudioForCTC", "audio", WAVE, **SPEECH, conv_pos_kernel_size=3),
    hugging(
        "ASTForAudioClassification",
        "audio",
        values(2, 24, 16, key="input_values"),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=24,
        num_mel_bins=16,
    ),
    hugging(
        "EncodecModel",
        "audio",
        values(2, 1, 320),
        num_filters=4,
        hidden_size=16,
        upsampling_ratios=[4, 2],
        codebook_size=16,
        codebook_dim=16,
        num_residual_layers=1,
    ),
    hugging(
        "VideoMAEForVideoClassification", "video", values(2, 4, 3, 32, 32, key="pixel_values"), **PATCHES, num_frames=4
    ),
    hugging(
        "TimesformerForVideoClassification",
        "video",
        values(2, 4, 3, 32, 32, key="pixel_values"),
        **PATCHES,
        num_frames=4,
    ),
    hugging(
        "VivitForVideoClassification",
        "video",
        values(2, 4, 3, 32, 32, key="pixel_values"),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        num_frames=4,
        tubelet_size=[2, 8, 8],
    ),
    hugging(
        "CLIPModel",
        "image and text",
        lambda: both(),
        own_head=True,
        projection_dim=16,
        text_config={**SMALL, "eos_token_id": 98},
        vision_config=PATCHES,
    ),
    hugging("SiglipModel", "image and text", lambda: both(), text_config=SMALL, vision_config=PATCHES),
    hugging(
        "PatchTSTForClassification",
        "time series",
        values(2, 24, 3, key="past_values"),
        num_input_channels=3,
        context_length=24,
        patch_length=4,
        patch_stride=4,
        d_model=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        num_targets=5,
        use_cls_token=True,
    ),
)


def switch() -> nn.Module:
    """Its router casts to a type of its own, here the model's, so that float64 is that."""
    transformers = importlib.import_module("transformers")
    config = transformers.SwitchTransformersConfig(
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        use_cache=False,
    )
    model: nn.Module = transformers.SwitchTransformersForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(
            module, transformers.models.switch_transformers.modeling_switch_transformers.SwitchTransformersTop1Router
        ):
            module.dtype = torch.get_default_dtype()
    return model


def bart_text() -> Call:
    _, given = text()()
    given["input_ids"][:, -1] = 2  # the token that ends a sentence, which is classified
    return (), given


def spoken() -> Call:
    _, given = text()()
    x = torch.randn(2, 8, 40, generator=generator())
    return (), {"input_features": x, "decoder_input_ids": given["input_ids"]}


def both() -> Call:
    _, given = text()()
    return (), {**given, **images(32, **PIXELS)()[1]}


# -- written by hand


class Twice(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        layers = []
        for width in (inputs, outputs):
            layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers)


class UNet(nn.Module):
    """Down, up by transposed convolutions, with what lies beside joined on."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = Twice(3, width), Twice(width, 2 * width), Twice(2 * width, 4 * width)
        self.up2, self.join2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2), Twice(4 * width, 2 * width)
        self.up1, self.join1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2), Twice(2 * width, width)
        self.pool, self.out = nn.MaxPool2d(2), nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(self.pool(one))
        found = self.join2(torch.cat([two, self.up2(self.middle(self.pool(two)))], 1))
        result: Tensor = self.out(self.join1(torch.cat([one, self.up1(found)], 1)))
        return result


class Tagger(nn.Module):
    """Embedding, a two-way LSTM and a linear classifier of the last states."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(99, 16)
        self.lstm = nn.LSTM(16, 24, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.fc = nn.Linear(48, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.fc(self.lstm(self.embedding(input_ids))[0].mean(1))
        return found


class Recorder(nn.Module):
    """One-dimensional convolutions over a signal, then a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, 8, 9, stride=4), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv1d(8, 16, 5, 2))
        self.gru, self.fc = nn.GRU(16, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.gru(self.stem(x[:, None]).transpose(1, 2))[0][:, -1])
        return found


def torch_transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.Sequential(nn.Linear(6, 32), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(32 * 5, 5))


BY_HAND = (
    Entry("by hand:unet", "segmentation", UNet, images(32)),
    Entry("by hand:lstm", "text", Tagger, text()),
    Entry("by hand:gru", "audio", Recorder, values(2, 200)),
    Entry("torch:TransformerEncoder", "text", torch_transformer, values(2, 5, 6)),
)

MODELS: tuple[Entry, ...] = (*TIMM, *TORCHVISION, *TRANSFORMERS, *BY_HAND)
