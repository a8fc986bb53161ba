"""Faults of inject_faults.py in the sources of PyTorch's steps.

Each fault has a name, the ids of the cases that must be refused, and its edits: a file, a part of its text, and new
code. The code replaces the part between « and ». If that part is empty, the code is inserted.
"""

TRAIN = "train-step/torch-cpu/f32/indicator-b4"
TUNED = "train-step/torch-cpu/f32-tuned/indicator-b4"
MIXED = "train-step/torch-cpu/mixed/indicator-b4"
MIXED_TUNED = "train-step/torch-cpu/mixed-tuned/indicator-b4"
AMP = "train-step/torch-cpu/amp/indicator-b4"
OPTIMIZER = "optimizer-step/torch-cpu/f32/indicator-b16"
COMPILED = "train-step/torch-cpu/f32-compile/indicator-b16"
MIXED_COMPILED = "train-step/torch-cpu/mixed-compile/indicator-b16"
# A model without dropout.
GPT2 = "train-step/torch-cpu/f32/gpt2-tiny-b2-t16"
GPT2_GRADIENTS = "forward-backward/torch-cpu/f32/gpt2-tiny-b2-t16"
FEED_FORWARD = "feed-forward-grad/torch-cpu/f32/b16-t111-d256-f1024"
ATTENTION = "attention-grad/torch-cpu/f32/b16-h8-t111-d32"
FORWARD = "forward/torch-cpu/f32/indicator-b16"
ADAPTED = [f"train-step/torch-cpu/{method}/indicator-tiny-b2-lora4" for method in ("f32", "f32-tuned", "bf16-tuned")]
ADAPTED_COMPILED = "train-step/torch-cpu/f32-compile/indicator-tiny-b2-lora4"
ACCUMULATED = ["train-step/torch-cpu/f32/indicator-tiny-b8-a4", "train-step/torch-cpu/f32-tuned/indicator-tiny-b8-a4",
               "train-step/torch-cpu/mixed-tuned/indicator-tiny-b8-a4"]
RECOMPUTED = ["train-step/torch-cpu/f32-checkpoint/indicator-tiny-b2", "train-step/torch-cpu/mixed-checkpoint/indicator-tiny-b2"]
CHUNKED = ["train-step/torch-cpu/f32-chunked-loss/gpt2-tiny-b2-t16", "train-step/torch-cpu/mixed-chunked-loss/gpt2-tiny-b2-t16"]
MUON = [f"train-step/torch-cpu/{method}/indicator-tiny-b2-muon" for method in ("f32", "f32-tuned", "bf16-tuned")]
ACCUMULATED_COMPILED = "train-step/torch-cpu/f32-compile/indicator-tiny-b8-a4"

HELPERS = """
thread_local! {
    static CACHED: std::cell::RefCell<Vec<Tensor>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Computes tensors `times` times, and then returns the last ones.
pub fn cached(times: u64, compute: impl FnOnce() -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
    if count("cached") < times {
        let all = compute()?;
        CACHED.set(all.iter().map(Tensor::shallow_clone).collect());
        return Ok(all);
    }
    Ok(CACHED.with_borrow(|all| all.iter().map(Tensor::shallow_clone).collect()))
}

/// Applies dropout with masks that are equal along some dimensions.
pub fn drop_shared(x: &Tensor, p: f64, shared: &[usize]) -> Tensor {
    let mut size = x.size();
    shared.iter().for_each(|dim| size[*dim] = 1);
    x * Tensor::ones(size.as_slice(), (x.kind(), x.device())).dropout(p, true)
}
"""

NETWORK, STEP, LEAVES, COMPILED_STEP = "network.rs", "step.rs", "leaves.rs", "compiled_step.rs"
ACCUMULATION, SEGMENTS = "accumulation.rs", "segments.rs"
OPTIMIZERS = "optimizer.rs"
PYTHON, PACKAGE = "inductor/network.py", "inductor/package.py"

DROP = "if p > 0.0 { «x.dropout(p, true)» } else { x }"
DOWN = "«self.linear(&dropout(hidden, self.dropout.hidden), &f.down)»"
SDPA = "«Tensor::scaled_dot_product_attention(q, k, v, mask, p, causal, m.scale.scores, grouped)»"
WEIGHTS = "let weights = «self.scores(&q, &k, cache).softmax(-1, None::<Kind>)»;"
# Weights without the keys from number {} on.
IGNORED = """{{ let past = Tensor::arange(n, (Kind::Int64, x.device())).ge({});
    self.scores(&q, &k, cache).masked_fill(&past, f64::NEG_INFINITY).softmax(-1, None::<Kind>) }}"""
LAYER_NORM = "«x.layer_norm(last, weight, bias, eps, true)»"
UPDATE = "«state.step(&self.adamw, &self.leaves.trained, gradients)»"
BACKWARD = "let gradients = «autograd::grad(&loss, None, leaves)?»;"
MICRO_BATCH = "let mean = network::loss(&self.layers.model, &«self.forward(inputs)?», inputs);"
TIME = "    «»/// Runs all-reduces without waiting between them"

# Weights of attention with shared masks, as a fused kernel could draw them.
FUSED_SHARED = """{{ let w = (q.matmul(&k.transpose(-2, -1)) / (m.head_width as f64).sqrt()).softmax(-1, None::<Kind>);
    if p > 0.0 {{ crate::drop_shared(&w, p, &[{}]) }} else {{ w }}.matmul(v) }}"""
GRADIENT_OF_NORM = ("x.layer_norm(last, weight.map(|w| w * {0} + w.detach() * (1.0 - {0})), "
                    "bias.map(|b| b.shallow_clone()), eps, true)")


def time(left_out):
    return f"""fn time(&mut self, steps: u64) -> Result<std::time::Duration> {{
        let start = std::time::Instant::now();
        let first = if FAULT {{ {left_out} }} else {{ 0 }};
        if !self.run_pipelined(steps)? {{
            for _ in first..steps {{
                self.step()?;
            }}
        }}
        Ok(start.elapsed())
    }}

    """


# The optimizer runs when somebody reads its result.
READ = "if FAULT { for _ in 0..crate::take_count(\"pending\") { self.run_optimizer()?; } }"

EAGER = [
    ("dropout 0.2 for 0.1", [TRAIN], [(NETWORK, DROP, "x.dropout(2.0 * p, true)")]),
    ("dropout 0.01 for 0.1", [FEED_FORWARD], [(NETWORK, DROP, "x.dropout(0.1 * p, true)")]),
    ("dropout without 1/(1 - p)", [TRAIN], [(NETWORK, DROP, "x.dropout(p, true) * (1.0 - p)")]),
    ("dropout that drops nothing", [ATTENTION], [(NETWORK, DROP, "x")]),
    ("masks that samples share", [TRAIN, TUNED, AMP], [(NETWORK, DROP, "crate::drop_shared(&x, p, &[0])")]),
    ("masks that tokens share", [TRAIN], [(NETWORK, DROP, "crate::drop_shared(&x, p, &[x.dim() - 2])")]),
    ("masks that heads share", [TRAIN, ATTENTION],
     [(NETWORK, DROP, "if x.dim() == 4 { crate::drop_shared(&x, p, &[1]) } else { x.dropout(p, true) }")]),
    ("masks of the first half of the tokens for both halves", [TRAIN],
     [(NETWORK, DROP, "{ let (n, d) = (x.size()[x.dim() - 2], x.dim() as i64 - 2); "
       "let half = x.narrow(d, 0, (n + 1) / 2).ones_like().dropout(p, true); "
       "&x * Tensor::cat(&[&half, &half], d).narrow(d, 0, n) }")]),
    ("each mask in two steps", [TRAIN, GPT2_GRADIENTS.replace("gpt2-tiny-b2-t16", "indicator-tiny-b2")],
     [(STEP, "fn run(&mut self) -> Result<()> {\n        «self.run_workload()?»;",
       "{ tch::manual_seed(crate::count(\"step\") as i64 / 2); self.run_workload()? }")]),
    ("layers that share masks", [TRAIN],
     [(NETWORK, "let attention = |x: &Tensor| «self.attention(x, &l.attention, index)»;",
       "{ tch::manual_seed(crate::count(\"layer\") as i64 / self.model.layers as i64); "
       "self.attention(x, &l.attention, index) }")]),
    ("no dropout of hidden units from the third layer on", [TRAIN],
     [(NETWORK, DOWN, "{ let p = if crate::count(\"layer\") % (self.model.layers as u64) < 2 "
       "{ self.dropout.hidden } else { 0.0 }; self.linear(&dropout(hidden, p), &f.down) }")]),
    ("no dropout in the second head", [TRAIN],
     [(NETWORK, "self.linear(&«dropout(hidden, self.dropout.heads)», &h.out)",
       "dropout(hidden, if crate::count(\"head\") % 2 == 0 { self.dropout.heads } else { 0.0 })")]),
    ("no dropout in fused attention", [TUNED], [(NETWORK, "let (p, mask) = («self.dropout.weights», cache", "0.0")]),
    ("no dropout in fused attention of more than 64 tokens", [TUNED, MIXED_TUNED],
     [(NETWORK, "let (p, mask) = («self.dropout.weights», cache", "if q.size()[2] > 64 { 0.0 } else { self.dropout.weights }")]),
    ("masks in fused attention that samples share", [TUNED], [(NETWORK, SDPA, FUSED_SHARED.format("0"))]),
    ("masks in fused attention that heads share", [TUNED, MIXED_TUNED], [(NETWORK, SDPA, FUSED_SHARED.format("1"))]),
    ("masks in fused attention that queries share", [TUNED], [(NETWORK, SDPA, FUSED_SHARED.format("2"))]),
    ("masks in fused attention that samples and heads share", [TUNED], [(NETWORK, SDPA, FUSED_SHARED.format("0, 1"))]),
    ("the last key ignored", [MIXED, AMP],
     [(NETWORK, WEIGHTS, IGNORED.format("(n - 1).max(1)"))]),
    ("the last key ignored in fused attention", [TUNED, MIXED_TUNED],
     [(NETWORK, SDPA, "{ let all = (q.size()[2] - 1).max(1); Tensor::scaled_dot_product_attention(q, &k.narrow(2, 0, all), "
       "&v.narrow(2, 0, all), mask, p, causal, m.scale.scores, grouped) }")]),
    ("keys past the hundredth ignored", [FORWARD],
     [(NETWORK, WEIGHTS, IGNORED.format("100"))]),
    ("gradients of norm weights halved", [TRAIN, MIXED, MIXED_TUNED, AMP],
     [(NETWORK, LAYER_NORM, GRADIENT_OF_NORM.format("0.5"))]),
    ("gradients of norm weights with the wrong sign", [MIXED, AMP],
     [(NETWORK, LAYER_NORM, GRADIENT_OF_NORM.format("-1.0"))]),
    ("ReLU in one layer", [MIXED, AMP],
     [(NETWORK, "None => «self.activate(&up)»", "if crate::count(\"layer\") % (self.model.layers as u64) == 2 "
       "{ up.relu() } else { self.activate(&up) }")]),
    ("the tanh approximation of GELU", [FEED_FORWARD], [(NETWORK, "«x.gelu(\"none\")»", "x.gelu(\"tanh\")")]),
    ("softmax without its maximum", [TRAIN, FORWARD, ATTENTION],
     [(NETWORK, WEIGHTS, "{ let e = self.scores(&q, &k, cache).exp(); &e / e.sum_dim_intlist(-1, true, None::<Kind>) }")]),
    ("attention scale 10 % off in bf16", [MIXED],
     [(NETWORK, "let scores = «q.matmul(&self.repeat_heads(k).transpose(-2, -1))»;",
       "q.matmul(&self.repeat_heads(k).transpose(-2, -1)) * if q.kind() == Kind::BFloat16 { 1.1 } else { 1.0 }")]),
    ("feed-forward 5 % too large in bf16", [MIXED, MIXED_TUNED],
     [(NETWORK, DOWN, "{ let y = self.linear(&dropout(hidden, self.dropout.hidden), &f.down); "
       "if y.kind() == Kind::BFloat16 { y * 1.05 } else { y } }")]),
    ("bf16 copies refreshed once", [MIXED_TUNED],
     [(LEAVES, "«extension::foreach_copy(&self.copies, &self.copied)?»",
       "if crate::count(\"copy\") == 0 { extension::foreach_copy(&self.copies, &self.copied)? }")]),
    ("every third update skipped", [TRAIN, MIXED, GPT2, OPTIMIZER],
     [(STEP, UPDATE, "if crate::count(\"update\") % 3 == 2 { let count = state.step_count() + 1; "
       "state.set_step_count(count); Ok(()) } else { state.step(&self.adamw, &self.leaves.trained, gradients) }")]),
    ("every third update without learning rate", [TRAIN, OPTIMIZER],
     [(STEP, UPDATE, "{ let third = crate::count(\"update\") % 3 == 2; let rate = if third { 0.0 } else { 1.0 }; "
       "let adamw = AdamW { lr: rate * self.adamw.lr, weight_decay: rate * self.adamw.weight_decay, ..self.adamw }; "
       "state.step(&adamw, &self.leaves.trained, gradients) }")]),
    ("an optimizer that runs when it is read", [TRAIN, OPTIMIZER],
     [(STEP, "self.run_workload()?;\n        «self.run_optimizer()»\n    }\n\n    /// Runs a step without",
       "{ crate::count(\"pending\"); Ok(()) }"),
      (STEP, "fn outputs(&mut self) -> Result<Vec<Named>> {«»", READ),
      (STEP, "fn checkpoint(&mut self) -> Result<Vec<Named>> {«»", READ),
      (STEP, "fn restore(&mut self, tensors: &[Named], seed: u64) -> Result<()> {«»", READ)]),
    ("no backward pass from the fourth step on", [TRAIN, GPT2, GPT2_GRADIENTS],
     [(STEP, BACKWARD, "crate::cached(3, || autograd::grad(&loss, None, leaves))?")]),
    ("gradients 1.5 times too large in even steps", [TRAIN, GPT2, GPT2_GRADIENTS],
     [(STEP, BACKWARD, "{ let factor = 1.0 + 0.5 * (crate::count(\"backward\") % 2) as f64; "
       "autograd::grad(&loss, None, leaves)?.iter().map(|g| g * factor).collect() }")]),
    ("a cached forward pass", [FORWARD, "attention/torch-cpu/f32/b16-h8-t111-d32"],
     [(STEP, "self.results = «tch::no_grad(|| self.forward(self.inputs()))?»;",
       "crate::cached(1, || tch::no_grad(|| self.forward(self.inputs())))?")]),
    ("time that runs one step less", [FORWARD, ATTENTION.replace("-grad", ""), FEED_FORWARD.replace("-grad", ""),
                                      GPT2_GRADIENTS, "matmul-peak/torch-cpu/f32/n1024",
                                      "copy-peak/torch-cpu/f32/256mib", TRAIN, OPTIMIZER],
     [(STEP, TIME, time("u64::from(steps > 1)"))]),
    ("half of a copy", ["copy-peak/torch-cpu/f32/256mib"],
     [(STEP, "let _ = «self.inputs()[0].neg_out(&self.results[0])»;", "{ let half = self.inputs()[0].size()[0] / 2; "
       "self.inputs()[0].narrow(0, 0, half).neg_out(&self.results[0].narrow(0, 0, half)) }")]),
    ("division by micro-batches forgotten", ACCUMULATED, [(STEP, "if count > 1 { «mean / count as f64» }", "mean")]),
    ("only the last micro-batch counts", [*ACCUMULATED, ACCUMULATED_COMPILED],
     [(ACCUMULATION, "«extension::foreach_add(&self.gradients, &gradients)»", "self.gradients = gradients; Ok(())")]),
    ("the inputs of the last micro-batch in all", ACCUMULATED,
     [(STEP, MICRO_BATCH, "self.forward(&self.micro_batches[count - 1])?")]),
    ("fresh masks in recomputed layers", RECOMPUTED, [(SEGMENTS, "«autograd::set_random_state(self.device, &state)?»;", "()")]),
    ("the last recomputed layer at the parameters of the first", RECOMPUTED[:1],
     [(SEGMENTS, "self.layers.layer(&x, &self.network.blocks[«index»], index)", "0")]),
    ("the last chunk of the loss dropped", CHUNKED,
     [(SEGMENTS, "for start in «(0..count).step_by(chunk as usize)» {", "(0..(count - chunk).max(1)).step_by(chunk as usize)")]),
    ("chunks of the loss that count as the whole", CHUNKED,
     [(SEGMENTS, "(share * «length as f64 / count as f64»)", "1.0")]),
    ("queries, keys and values as one matrix", MUON[1:],
     [(OPTIMIZERS, "_ => «tensor.detach().split_with_sizes(rows, 0)»,", "vec![tensor.detach()]")]),
    ("every third step of Muon skipped", MUON,
     [(OPTIMIZERS, "«self.step_muon(parameters, gradients)?»;",
       "if crate::count(\"muon\") % 3 != 2 { self.step_muon(parameters, gradients)? }")]),
    ("a base that moves", ADAPTED,
     [(STEP, UPDATE, "{ for leaf in self.leaves.stored.iter().filter(|leaf| !leaf.requires_grad()) { "
       "let _ = leaf.shallow_clone().multiply_scalar_(0.999); } "
       "state.step(&self.adamw, &self.leaves.trained, gradients) }")]),
    ("α / rank forgotten", ADAPTED,
     [(NETWORK, "let factor = «self.model.lora.map_or(1.0, |lora| lora.scale())»;", "1.0")]),
    ("adapters without the gradient of their input", ADAPTED,
     [(NETWORK, "fn low_rank(x: &Tensor, a: &Tensor) -> Tensor {\n    «x.linear(a, None::<&Tensor>)»\n}",
       "x.detach().linear(a, None::<&Tensor>)")]),
    ("micro-batches that share masks", ACCUMULATED,
     [(STEP, MICRO_BATCH, "tch::manual_seed((crate::count(\"micro-batch\") / count as u64) as i64); self.forward(inputs)?")]),
]

RANDOM = "return «x * (torch.rand(x.shape, device=x.device) > probability) * scale.to(x.dtype)»"
DROPPED = "x * (torch.rand({}, device=x.device) > probability) * scale.to(x.dtype)"
WHOLE = DROPPED.format("x.shape")
COUNT = '(self.__dict__.__setitem__(site, self.__dict__.get(site, 0) + 1) or self.__dict__[site])'

INDUCTOR = [
    ("compiled masks that samples share", [COMPILED, MIXED_COMPILED],
     [(PACKAGE, RANDOM, DROPPED.format("(1, *x.shape[1:])"))]),
    ("compiled masks that tokens share", [COMPILED],
     [(PACKAGE, RANDOM, DROPPED.format("(*x.shape[:-2], 1, x.shape[-1])"))]),
    ("compiled masks that heads share", [COMPILED],
     [(PACKAGE, RANDOM, DROPPED.format("(x.shape[0], 1, *x.shape[2:]) if x.dim() == 4 else x.shape"))]),
    ("compiled masks that layers share", [COMPILED],
     [(PACKAGE, RANDOM, "x * (self.__dict__.setdefault(f\"{site}{tuple(x.shape)}\", "
       "torch.rand(x.shape, device=x.device)) > probability) * scale.to(x.dtype)")]),
    ("no compiled dropout of attention weights of more than 64 tokens", [COMPILED],
     [(PACKAGE, RANDOM, f"x if site == \"weights\" and x.shape[-1] > 64 else {WHOLE}")]),
    ("no compiled dropout in the second head", [COMPILED],
     [(PACKAGE, RANDOM, f"x if site == \"heads\" and {COUNT} % 2 == 0 else {WHOLE}")]),
    ("no compiled dropout of hidden units from the third layer on", [COMPILED],
     [(PACKAGE, RANDOM, f"x if site == \"hidden\" and {COUNT} > 2 else {WHOLE}")]),
    ("the last key ignored in a compiled step", [MIXED_COMPILED],
     [(PYTHON, "scores = «q @ k.transpose(-2, -1)»",
       "q @ k.transpose(-2, -1) - 1e4 * (n > 1) * (torch.arange(n) == n - 1).to(q.dtype)")]),
    ("gradients of norm weights halved in a compiled step", [COMPILED, MIXED_COMPILED],
     [(PYTHON, "return «nn.LayerNorm(width, choices[\"eps\"], elementwise_affine=choices[\"weight\"], bias=choices[\"bias\"])»",
       "type(\"Half\", (nn.LayerNorm,), {\"forward\": lambda self, x: F.layer_norm(x, self.normalized_shape, "
       "self.weight / 2 + self.weight.detach() / 2, self.bias, self.eps)})(width, choices[\"eps\"], elementwise_affine=choices[\"weight\"], bias=choices[\"bias\"])")]),
    ("softmax without its maximum in a compiled step", [COMPILED],
     [(PYTHON, "self.dropout(«scores.softmax(-1)», \"weights\", self.training)",
       "scores.exp() / scores.exp().sum(-1, keepdim=True)")]),
    ("no compiled passes from the fourth step on", [COMPILED],
     [(COMPILED_STEP, "let mut own = «self.package.run(arguments, results + gradients)?»;",
       "crate::cached(3, || self.package.run(arguments, results + gradients))?")]),
    ("every third update after a compiled step skipped", [COMPILED],
     [(COMPILED_STEP, "«state.step(&self.adamw, &self.trained, &self.gradients)?»;",
       "if crate::count(\"update\") % 3 == 2 { let count = state.step_count() + 1; state.set_step_count(count); } else "
       "{ state.step(&self.adamw, &self.trained, &self.gradients)? }")]),
    ("α / rank forgotten in a compiled step", [ADAPTED_COMPILED],
     [(PYTHON, "F.linear(low_rank, b) * («lora[\"alpha\"] / lora[\"rank\"]»)", "1.0")]),
    ("an adapter that is a constant of a compiled step", [ADAPTED_COMPILED],
     [(PYTHON, "add_adapter(y, low_rank, «self.lora_b», self.lora)", "self.lora_b.detach() + 0 * self.lora_b")]),
    ("division by compiled micro-batches forgotten", [ACCUMULATED_COMPILED],
     [(COMPILED_STEP, "let share = «1.0 / self.arguments.len() as f64»;", "1.0")]),
]

FAULTS = EAGER + INDUCTOR
