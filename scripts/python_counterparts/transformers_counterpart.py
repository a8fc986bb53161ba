"""A model of Hugging Face's transformers. Usage:

transformers_twin.py --parity CONFIG OUTPUTS...   compares loss, logits and gradients with what
                                                  a worker of ours wrote
transformers_twin.py DESCRIPTION VARIANT CONFIG  times its training step

Variants: eager, sdpa (attention by scaled_dot_product_attention, fused AdamW).
"""
import re

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import hugging_face
from protocol import serve

DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout_prob",
            "attention_probs_dropout_prob")


def build(path, tokens, attention, dropout):
    fields = hugging_face.configuration(path)
    family = fields.pop("model_type")
    config = AutoConfig.for_model(family, **fields)
    for name in DROPOUTS:
        if not dropout and hasattr(config, name):
            setattr(config, name, 0.0)
    # Learned positions are as many as tokens, here as in ours.
    for name in ("n_positions", "max_position_embeddings"):
        if family in ("gpt2", "bert") and hasattr(config, name):
            setattr(config, name, tokens)
    config.use_cache = False
    maker = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    return family, maker.from_config(config, attn_implementation=attention).float().train()


def loss_of(net, tokens, following):
    logits = net(input_ids=tokens).logits
    return logits, F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())


def parity(path, files):
    ours = {name: data for file in files for name, data in hugging_face.read(file).items()}
    tokens, following = (torch.from_numpy(ours[f"input/{name}"].astype("int64")) for name in ("tokens", "next"))
    family, net = build(path, tokens.shape[1], "eager", False)
    net.eval()
    named = dict(net.named_parameters())
    turned = lambda name, a: a.T if re.search(r"\.c_(attn|proj|fc)\.weight$", name) else a
    with torch.no_grad():
        for name, data in hugging_face.stacked(family, hugging_face.of_kind(ours, "parameter")).items():
            target = turned(name, named[name])
            # The row of a second sentence's type never moves.
            target[:len(data)].copy_(torch.from_numpy(data.copy()))
    logits, loss = loss_of(net, tokens, following)
    loss.backward()
    gradients = {name: turned(name, p.grad).numpy() for name, p in named.items() if p.grad is not None}
    hugging_face.report(family, ours, loss.item(), logits.detach().numpy(), gradients)


def main(case, variant, path):
    precision, batch, tokens = case["compute"], case["batch"], case["model"]["tokens"]
    device = torch.device(case["device"])
    good = variant == "sdpa"
    _, net = build(path, tokens, "sdpa" if good else "eager", True)
    kind = {"bf16": torch.bfloat16}.get(precision, torch.float32)
    net = net.to(device, kind)
    data = [torch.randint(net.config.vocab_size, (batch, tokens), device=device) for _ in range(2)]
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4, weight_decay=1e-5, fused=True if good else None)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss_of(net, *data)[1].backward()
        optimizer.step()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    serve(step)


if __name__ == "__main__":
    hugging_face.run(parity, main)
