"""The Python counterpart of a custom model with Hugging Face's transformers.

transformers_counterpart.py --parity CONFIG DESCRIPTION FILE...  compares loss, logits and gradients with FILE...,
                                                                 which the suite's worker wrote
transformers_counterpart.py DESCRIPTION VARIANT CONFIG  times the training step

Variants: eager, tuned (scaled_dot_product_attention, fused AdamW). Adapters are those of PEFT.
"""
import re

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import hugging_face
from torch_counterpart import versions  # noqa: F401 (side.py asks for it)

DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout_prob",
            "attention_probs_dropout_prob", "dropout", "hidden_dropout", "residual_dropout", "embedding_dropout")
# Encoders, and the number of their first position.
ENCODERS = {"bert": 0, "distilbert": 0, "roberta": 2, "xlm-roberta": 2, "camembert": 2}


def build(path, tokens, attention, dropout):
    fields = hugging_face.read_config(path)
    family = fields.pop("model_type")
    # The library would round constants to the type of the published weights.
    for name in ("dtype", "torch_dtype"):
        fields.pop(name, None)
    config = AutoConfig.for_model(family, **fields)
    for name in DROPOUTS:
        if not dropout and hasattr(config, name):
            setattr(config, name, 0.0)
    # The suite has one learned position per token.
    for name in ("n_positions", "max_position_embeddings"):
        if family in ("gpt2", "gpt_bigcode", "opt", *ENCODERS) and hasattr(config, name):
            setattr(config, name, tokens + ENCODERS.get(family, 0))
    config.use_cache = False
    auto_model = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    net = auto_model.from_config(config, attn_implementation=attention).float().train()
    # The suite has no padding, so the row of its token has a gradient.
    for module in net.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    return family, net


def add_adapters(family, net, lora):
    """Gives the linear layers of the blocks adapters, in place."""
    from peft import LoraConfig, get_peft_model

    modules = hugging_face.adapted_modules(family, lora, (name for name, _ in net.named_modules()))
    get_peft_model(net, LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=list(modules)))


def adapter_name(name):
    """Returns PEFT's name of an adapter."""
    return name.replace(".lora-a", ".lora_A.default.weight").replace(".lora-b", ".lora_B.default.weight")


def loss_of(net, tokens, following):
    options = {}
    if first := ENCODERS.get(net.config.model_type):
        options["position_ids"] = torch.arange(first, first + tokens.shape[1], device=tokens.device).expand_as(tokens)
    logits = net(input_ids=tokens, **options).logits
    return logits, F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())


def compare_outputs(path, model, files):
    suite = hugging_face.read_outputs(files)
    tokens, following = (torch.from_numpy(suite[f"input/{name}"].astype("int64")) for name in ("tokens", "next"))
    family, net = build(path, tokens.shape[1], "eager", False)
    net.eval()
    named = dict(net.named_parameters(remove_duplicate=False))
    heads = hugging_face.head_count(hugging_face.read_config(path))
    # GPT-2's Conv1D has weights [in, out].
    is_conv = lambda name: family == "gpt2" and re.search(r"\.c_(attn|proj|fc)\.weight$", name)
    out_in = lambda name, a: a.T if is_conv(name) else a
    stacked = hugging_face.stack(family, hugging_face.of_kind(suite, "parameter"), heads)
    if model.get("lora"):
        add_adapters(family, net, model["lora"])
        named.update((name, net.get_parameter(adapter_name(name))) for name in stacked if hugging_face.is_adapter(name))
    with torch.no_grad():
        for name, data in stacked.items():
            target = out_in(name, named[name])
            # BERT's row for the type of a second sentence has no counterpart in the suite.
            target[:len(data)].copy_(torch.from_numpy(data.copy()))
    logits, loss = loss_of(net, tokens, following)
    loss.backward()
    gradients = {name: out_in(name, p.grad).numpy() for name, p in named.items() if p.grad is not None}
    hugging_face.report(family, suite, loss.item(), logits.detach().numpy(), gradients, heads)


def build_step(case, variant, path):
    """Returns the function that runs a training step."""
    hugging_face.check_workload(case)
    batch, tokens, tuned = case["batch"], case["model"]["tokens"], variant == "tuned"
    device = torch.device(case["device"])
    family, net = build(path, tokens, "sdpa" if tuned else "eager", True)
    net = net.to(device, torch.bfloat16 if case["precision"] == "bf16" else torch.float32)
    if case["model"].get("lora"):
        add_adapters(family, net, case["model"]["lora"])
    data = [torch.randint(net.config.vocab_size, (batch, tokens), device=device) for _ in range(2)]
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=1e-5, fused=True if tuned else None)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss_of(net, *data)[1].backward()
        optimizer.step()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    return step


if __name__ == "__main__":
    hugging_face.run(compare_outputs, build_step)
