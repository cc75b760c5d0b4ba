"""SparK: whole models, single sparse layers, loss and masks, LAMB, schedules, groups, parameter counts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torchvision.ops import Permute

from isthmus.codec import create_timm
from isthmus.decoders.spark_unet import SparKUNet
from isthmus.encoders.backbone import Backbone
from isthmus.engine.optim import Schedule, create_optimizer, global_norm, layer_ids, param_groups
from isthmus.layers.masking import patchify, unpatchify, visible_from_noise
from isthmus.layers.sparse_conv import upsample_mask
from isthmus.layers.sparse_conv.functional import as_carrier
from isthmus.objectives import spark
from isthmus.objectives.spark import SparK, fill_hidden, masked_loss, patch_errors, visible_cells
from tests.parity.case import Case, UnknownCase

NORMS = {"bn": "batch", "ln": "layer", "": "none"}


def outputs(case: Case) -> dict[str, Tensor]:
    """Every tensor of ``case.expected``, from ours."""
    kinds = {
        "SparK": _model,
        "SparK.forward loss part": _loss,
        "SparK.mask": _mask,
        "SparseConv2d": _layers,
        "TheSameAsTimmLAMB": _lamb,
        "lr_wd_annealing": _schedules,
        "get_layer_id_and_scale_exp": _groups,
    }
    kind = kinds.get(case.object.split(",")[0])
    if kind is None:
        raise UnknownCase(f"{case.object}: no such object in SparK")
    return kind(case)


# ------------------------------------------------------------------------------------------------------- whole model


def _backbone(config: dict[str, Any]) -> Backbone:
    kind = config["cnn"]
    if "ResNet" in kind:
        block = Bottleneck if "Bottleneck" in kind else BasicBlock
        widths = {"channels": config["channels"], "base_width": config.get("base_width", 64)}
        return Backbone(ResNet(block, config["layers"], **widths, num_classes=0))
    if "ConvNeXt" in kind:
        return Backbone(ConvNeXt(depths=config["depths"], dims=config["dims"], num_classes=0))
    raise UnknownCase(f"no backbone {kind!r}")


def _model(case: Case) -> dict[str, Tensor]:
    config = case.config
    encoder = _backbone(config)
    norm = NORMS[config["densify_norm"]]
    decoder = SparKUNet(encoder.feature_info, config["decoder_width"], norm)
    objective = SparK(encoder, decoder, config["mask_ratio"], mode="masked" if config.get("sparse", True) else "zeroed")
    state = spark.from_official(case.params)
    missing, unexpected = objective.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name in ("mean", "std") or ".head." in name for name in missing), missing
    counted = sum(p.numel() for n, p in objective.named_parameters() if ".head." not in n)
    assert counted == case.meta["official_param_count"], counted
    objective.train("train mode" in case.meta["description"])

    image, visible = case.inputs["img"], case.inputs["active"][:, 0].bool()
    found: dict[str, Tensor] = {}
    seen: dict[str, list[Tensor]] = {}
    hook = decoder.densify.register_forward_hook(lambda _m, args, out: seen.update(features=args[0], filled=out))
    result = objective.loss(image, visible)
    hook.remove()
    for index, feature in enumerate(seen["features"]):
        found[f"fea_{index}"] = feature
    for index, filled in enumerate(reversed(seen["filled"])):
        found[f"to_dec_{index}"] = filled
    found["loss"], found["rec"] = result.loss, result.outputs["prediction"]
    found["vis_rec_or_inp"] = fill_hidden(result.outputs["prediction"], image, visible, objective.patch)

    result.loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    after = spark.to_official(objective.state_dict())
    for name in case.expected:
        kind, _, official = name.partition("/")
        if kind == "grad":
            found[name] = gradients[_our_name(official, case)]
        elif kind == "after":
            found[name] = after[official]
    return found


def _our_name(official: str, case: Case) -> str:
    """Our name of one official parameter: the one whose mapped tensor is the marked one."""
    marked = {name: name for name in case.params}
    return next(ours for ours, name in spark.from_official(marked).items() if name == official)


# -------------------------------------------------------------------------------------------------- loss and masks


def _loss(case: Case) -> dict[str, Tensor]:
    image, prediction, visible = case.inputs["img"], case.inputs["rec"], case.inputs["active"][:, 0].bool()
    patch = case.config["patch"]
    grid = (image.shape[2] // patch, image.shape[3] // patch)
    again = unpatchify(patchify(prediction, patch), patch, grid)
    rows = case.expected["unpatchify_rec_rows"].shape[2]
    # One patch of the first image was kept, and the case does not say which: the nearest of ours has to equal it.
    patches = patchify(image, patch)[0]
    nearest = (patches - case.expected["patch_img_0"]).abs().amax(1).argmin()
    return {
        "l2": patch_errors(prediction, image, patch),
        "loss": masked_loss(prediction, image, visible, patch),
        "vis": fill_hidden(prediction, image, visible, patch),
        "patch_img_0": patches[nearest],
        "unpatchify_rec_rows": again[:, :, :rows],
    }


def _mask(case: Case) -> dict[str, Tensor]:
    height, width = case.config["grid"]
    found = {}
    for ratio, keep in zip(case.config["ratios"], case.config["len_keep"], strict=True):
        assert visible_cells(height * width, ratio) == keep
        visible = visible_from_noise(case.inputs["noise"], keep)
        found[f"active_{ratio}"] = visible.view(-1, 1, height, width).long()
    return found


# ------------------------------------------------------------------------------------------------- optimisation


def _lamb(case: Case) -> dict[str, Tensor]:
    config = case.config
    names = sorted(name.removesuffix("0") for name in case.inputs if name.endswith("0"))
    parameters = {name: nn.Parameter(case.inputs[f"{name}0"].clone()) for name in names}
    decay = {name: value for key, value in config["weight_decay"].items() for name in key.split(",")}
    groups = [{"params": [parameters[name]], "weight_decay": decay[name]} for name in names]
    optimizer = create_optimizer(
        "lamb",
        groups,
        lr=config["lr"],
        betas=config["betas"],
        eps=config["eps"],
        max_grad_norm=config["max_grad_norm"],
        bias_correction=config["bias_correction"],
        grad_averaging=config["grad_averaging"],
        trust_clip=config["trust_clip"],
        always_adapt=config["always_adapt"],
    )
    found = {}
    for step in range(1, 1 + sum(name.startswith(f"grad_{names[0]}_") for name in case.inputs)):
        for name in names:
            parameters[name].grad = case.inputs[f"grad_{name}_{step}"].clone()
        found[f"global_grad_norm_{step}"] = global_norm(parameters.values())
        optimizer.step()
        found |= {f"{name}_after_{step}": parameters[name].detach().clone() for name in names}
    return found


def _schedules(case: Case) -> dict[str, Tensor]:
    iterations = case.inputs["iteration"].tolist()
    found = {}
    for phase, config in case.config.items():
        schedule = Schedule(
            lr=config["peak_lr"],
            steps=config["max_it"],
            weight_decay=config["wd"],
            weight_decay_end=config.get("wd_end"),
            warmup_steps=config["warmup_it"],
        )
        values = torch.tensor([schedule.at(iteration) for iteration in iterations])
        found[f"lr_{phase}"], found[f"wd_{phase}"] = values.T
    return found


def _groups(case: Case) -> dict[str, Tensor]:
    found = {}
    for architecture, entry in case.config["names"].items():
        with torch.device("meta"):
            model = create_timm(architecture)
        names = entry["param_names"]
        mapped: Any = spark.backbone_from_official({name: name for name in names})  # type: ignore[misc]
        ours = {official: name for name, official in mapped.items()}
        ids = layer_ids(model)
        decays = {name: int(group["wd_scale"]) for group in param_groups(model, 0.05) for name in group["names"]}
        number = torch.tensor([ids[ours[name]] for name in names])
        found[f"{architecture}/layer_id"] = number
        found[f"{architecture}/scale_exponent"] = max(ids.values()) - number
        found[f"{architecture}/weight_decay_scale"] = torch.tensor([decays[ours[name]] for name in names])
    _check_pretraining_groups(case)
    return found


def _check_pretraining_groups(case: Case) -> None:
    """The lists of a small ConvNeXt whose depths and widths can be read off the names."""
    listed = {decays: case.config.get(f"pretrain_small_convnext_{decays}", []) for decays in ("decay", "no_decay")}
    names = set(listed["decay"]) | set(listed["no_decay"])
    if not names:
        return
    blocks = {tuple(map(int, n.split(".")[3:5])) for n in names if ".sp_cnn.stages." in n}
    depths = [sum(place[0] == stage for place in blocks) for stage in range(4)]
    encoder = Backbone(ConvNeXt(depths=tuple(depths), dims=(8, 16, 32, 64), num_classes=0))
    identity = not any(name.startswith("densify_projs.0.") for name in names)
    objective = SparK(encoder, SparKUNet(encoder.feature_info, 64 if identity else 32, "layer"))
    theirs = {ours: name for name, ours in spark.to_official({n: n for n in objective.state_dict()}).items()}  # type: ignore[misc]
    for group in param_groups(objective, 0.04):
        ours = {theirs[name] for name in group["names"] if name in theirs}
        assert ours == set(listed["decay" if group["wd_scale"] else "no_decay"])


# ----------------------------------------------------------------------------------------------------- single layers


def _layers(case: Case) -> dict[str, Tensor]:
    raw, visible = case.inputs["x"], case.inputs["active"][:, 0].bool()
    masked = raw * upsample_mask(visible, (raw.shape[2], raw.shape[3]))
    found: dict[str, Tensor] = {}
    for name, described in case.config.items():
        if name.startswith(("conv", "maxpool", "avgpool")):
            layer = _windowed(name, described)
            layer.load_state_dict(_params(case, name))
            found[name] = _on_map(layer, masked, visible)
            if f"{name}_dense_input" in case.expected:
                found[f"{name}_dense_input"] = _on_map(layer, raw, visible, modes=("masked",))
        elif name == "bn":
            norm = nn.BatchNorm2d(raw.shape[1], eps=_number("eps", described), momentum=_number("momentum", described))
            norm.load_state_dict(_params(case, name))
            found["bn_train"] = _on_map(norm, raw, visible, modes=("masked",))
            found["bn_running_mean_after"], found["bn_running_var_after"] = norm.running_mean, norm.running_var
            found["bn_eval"] = _on_map(norm.eval(), raw, visible, modes=("masked",))
        elif name == "ln":
            eps = _number("eps", described)
            first, last = LayerNorm2d(raw.shape[1], eps=eps), nn.LayerNorm(raw.shape[1], eps=eps)
            first.load_state_dict(_params(case, "ln_first"))
            last.load_state_dict(_params(case, "ln_last"))
            found["ln_first"] = _on_map(first, raw, visible, modes=("masked",))
            last_on_map = nn.Sequential(Permute([0, 2, 3, 1]), last, Permute([0, 3, 1, 2]))
            found["ln_last"] = _on_map(last_on_map, raw, visible, modes=("masked",))
        elif name == "block":
            dim, kernel = re.fullmatch(r"dim (\d+) ks (\d+) layer scale", described).groups()
            block = ConvNeXtBlock(int(dim), kernel_size=int(kernel))
            names = {f"stages.0.0.{key}": value for key, value in _params(case, name).items()}
            mapped = spark.convnext_from_official(names)
            block.load_state_dict({key.removeprefix("stages.0.blocks.0."): value for key, value in mapped.items()})
            found["convnext_block"] = _on_map(block, masked, visible)
        else:
            raise UnknownCase(f"no layer {name!r}")
    return found


def _on_map(
    layer: Callable[..., Any], x: Tensor, visible: Tensor, modes: tuple[str, ...] = ("masked", "tiled")
) -> Tensor:
    """The masked result; the tiled one has to equal it wherever the input is zero at hidden places."""
    with torch.no_grad():
        results = [layer(as_carrier(x, visible, mode)).as_canvas().values for mode in modes]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)
    return results[0]


def _windowed(name: str, described: str) -> nn.Module:
    """``6->8 5x5 s2 p2 groups 2 bias``, ``3 s2 p1 count_include_pad``."""
    channels = re.match(r"(\d+)->(\d+) (\d+)x\3", described)
    stride, padding, dilation = (re.search(rf"\b{key}(\d+)", described) for key in "spd")
    window = {"stride": int(stride[1]) if stride else 1, "padding": int(padding[1]) if padding else 0}
    if channels is None:
        size = int(described.split()[0])
        if name.startswith("max"):
            return nn.MaxPool2d(size, **window)
        # Without padding to count, the two ways of counting agree.
        return nn.AvgPool2d(size, **window, count_include_pad=padding is None or "count_include_pad" in described)
    groups = re.search(r"groups (\d+)", described)
    fan_in, fan_out, size = map(int, channels.groups())
    groups_ = int(groups[1]) if groups else 1
    window["dilation"] = int(dilation[1]) if dilation else 1
    return nn.Conv2d(fan_in, fan_out, size, **window, groups=groups_, bias="bias" in described)


def _params(case: Case, layer: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{layer}."): t for n, t in case.params.items() if n.startswith(f"{layer}.")}


def _number(key: str, described: str) -> float:
    return float(re.search(rf"{key} ([\d.e-]+)", described)[1])


# ------------------------------------------------------------------------------------------------------------ counts


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    """Exact numbers of parameters, and how many patches stay visible."""
    config = entry["config"]
    with torch.device("meta"):
        model = create_timm(name)
        encoder = Backbone(model)
        norm = NORMS[config["densify_norm"]]
        decoder = SparKUNet(encoder.feature_info, config["decoder_width"], norm)
        objective = SparK(encoder, decoder, config.get("mask_ratio", 0.6))

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    head = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("fc.", "head.")))
    densify = decoder.densify
    cells = (config["input_size"] // objective.patch) ** 2
    counted = {
        "params": size(model),
        "encoder_params_no_head": size(model) - head,
        "decoder_params": size(decoder) - size(densify),
        "densify_proj_params": size(densify.projections),
        "densify_norm_params": size(densify.norms),
        "mask_token_params": size(densify.mask_tokens),
        "pretraining_total": size(objective) - head,
        "len_keep": visible_cells(cells, objective.ratio),
    }
    return {key: value for key, value in counted.items() if key in entry or key in config}
