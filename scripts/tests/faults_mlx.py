"""Faults of inject_faults.py in the sources of MLX's steps. faults_torch.py describes the format."""
from faults_torch import time

TRAIN = "train-step/mlx-cpu/f32/indicator-b4"
TUNED = "train-step/mlx-cpu/f32-tuned/indicator-b4"
COMPILED = "train-step/mlx-cpu/f32-compile/indicator-b16"
MIXED = "train-step/mlx-cpu/mixed/indicator-b1"
OPTIMIZER = "optimizer-step/mlx-cpu/f32/indicator-b16"
FEED_FORWARD = "feed-forward-grad/mlx-cpu/f32/b16-t111-d256-f1024"
ATTENTION = "attention-grad/mlx-cpu/f32/b16-h8-t111-d32"
FORWARD = "forward/mlx-cpu/f32/indicator-b16"
ADAPTED = ["train-step/mlx-cpu/f32/indicator-tiny-b2-lora4", "train-step/mlx-cpu/f32-tuned/indicator-tiny-b2-lora4"]
MUON = [f"train-step/mlx-cpu/{method}/indicator-tiny-b2-muon" for method in ("f32", "f32-tuned", "bf16-tuned")]
ACCUMULATED = ["train-step/mlx-cpu/f32/indicator-tiny-b8-a4", "train-step/mlx-cpu/f32-tuned/indicator-tiny-b8-a4"]
RECOMPUTED = ["train-step/mlx-cpu/f32-checkpoint/indicator-tiny-b2"]
CHUNKED = ["train-step/mlx-cpu/f32-chunked-loss/gpt2-tiny-b2-t16", "train-step/mlx-cpu/mixed-chunked-loss/gpt2-tiny-b2-t16"]
# A model without dropout.
GPT2 = "train-step/mlx-cpu/f32-tuned/gpt2-tiny-b2-t16"
GPT2_GRADIENTS = "forward-backward/mlx-cpu/f32/gpt2-tiny-b2-t16"

HELPERS = """
/// Returns the first inputs of this process.
pub fn first_inputs(inputs: &[Array]) -> &'static [Array] {
    thread_local! {
        static FIRST: std::cell::OnceCell<&'static Vec<Array>> = const { std::cell::OnceCell::new() };
    }
    FIRST.with(|first| *first.get_or_init(|| Box::leak(Box::new(inputs.to_vec()))))
}
"""

NETWORK, PROGRAM, STEP, OPTIMIZERS = "network.rs", "program.rs", "step.rs", "optimizer.rs"
NEXT_KEY = "self.key = «take(1).pop().context(\"the program returns a key last\")?»;"
MASK = "let mask = «bernoulli(&Array::from_f32(keep as f32), x.shape(), &key)?»;"
SHARED = "{{ let mut shape = x.shape().to_vec(); {} bernoulli(&Array::from_f32(keep as f32), &shape, &key)? }}"
SOFTMAX = "let weights = «softmax(&self.scores(&q, k, window)?)?»;"
LAYER_NORM = "«fast::layer_norm(x, layer.weight.as_ref(), layer.bias.as_ref(), eps as f32)»"
ALL = "self.results.iter().chain(&self.gradients).chain(&self.state).chain([&self.key])"
EVALUATION = f"Ok(«eval({ALL})»?)\n    }}\n\n    /// Runs all-reduces"
TIME = "    «»/// Runs all-reduces without waiting between them"
# Scores of the keys from number {} on become very small.
IGNORED = ("{{ let scores = self.scores(&q, k, window)?; let past = ops::arange::<f32, f32>(None, n as f32, None)?.ge(Array::from_f32({}))?; "
           "softmax(&scores.add(past.as_dtype(x.dtype())?.multiply(scalar(-3e4, x.dtype()))?)?)? }}")

FAULTS = [
    ("dropout 0.2 for 0.1", [TRAIN], [(NETWORK, "let keep = «1.0 - p»;", "1.0 - 2.0 * p")]),
    ("dropout without 1/(1 - p)", [FEED_FORWARD],
     [(NETWORK, "«scale(&x.multiply(mask)?, 1.0 / keep)»", "x.multiply(mask)")]),
    ("dropout that drops nothing", [ATTENTION], [(NETWORK, "if «p == 0.0» {\n            return Ok(x)", "p < 2.0")]),
    ("the same random key at every site", [TUNED],
     [(NETWORK, "let key = «self.random.next_key()?»;", "mlx_rs::random::key(7)?")]),
    ("masks that samples share", [TRAIN, TUNED], [(NETWORK, MASK, SHARED.format("shape[0] = 1;"))]),
    ("masks that tokens share", [TRAIN],
     [(NETWORK, MASK, SHARED.format("let last = shape.len(); shape[last - 2] = 1;"))]),
    ("masks that heads share", [TRAIN, ATTENTION],
     [(NETWORK, MASK, SHARED.format("if shape.len() == 4 { shape[1] = 1; }"))]),
    ("each mask in two steps", [TRAIN, TUNED],
     [(STEP, NEXT_KEY, "if self.step_count % 2 == 1 { self.key.clone() } else { take(1).pop().context(\"a key\")? }")]),
    ("the same masks in every step", [TRAIN, TUNED, COMPILED],
     [(PROGRAM, "let mut layers = «self.layers(a.key.clone())»;", "self.layers(mlx_rs::random::key(7)?)")]),
    ("no dropout of hidden units from the third layer on", [TRAIN],
     [(NETWORK, "self.dropout(hidden, «self.dropout.hidden»)",
       "if crate::count(\"layer\") % (self.model.layers as u64) < 2 { self.dropout.hidden } else { 0.0 }")]),
    ("no dropout in the second head", [TRAIN, TUNED],
     [(NETWORK, "self.dropout(active, «self.dropout.heads»)",
       "if crate::count(\"head\") % 2 == 0 { self.dropout.heads } else { 0.0 }")]),
    ("no dropout of attention weights of more than 64 tokens", [TRAIN, TUNED],
     [(NETWORK, "self.dropout(weights, «self.dropout.weights»)?",
       "if n > 64 { 0.0 } else { self.dropout.weights }")]),
    ("keys past the hundredth ignored", [FORWARD], [(NETWORK, SOFTMAX, IGNORED.format("100.0"))]),
    ("the last key ignored", [MIXED], [(NETWORK, SOFTMAX, IGNORED.format("(n - 1).max(1) as f32"))]),
    ("gradients of norm weights halved", [TRAIN, MIXED],
     [(NETWORK, LAYER_NORM, "{ let halved = layer.weight.as_ref().map(|w| { let half = scale(w, 0.5)?; "
       "half.add(mlx_rs::stop_gradient(&half)?) }).transpose()?; "
       "fast::layer_norm(x, halved.as_ref(), layer.bias.as_ref(), eps as f32) }")]),
    ("softmax without its maximum", [TRAIN, FORWARD],
     [(NETWORK, SOFTMAX, "{ let e = self.scores(&q, k, window)?.exp()?; e.divide(e.sum_axis(-1, true)?)? }")]),
    ("attention scale 10 % off", [ATTENTION],
     [(NETWORK, "let scores = scale(q, «m.score_scale()»)?", "1.1 * m.score_scale()")]),
    ("only the loss is evaluated", [TRAIN, TUNED, GPT2, GPT2_GRADIENTS],
     [(STEP, EVALUATION, "eval(self.results.iter())")]),
    ("nothing is evaluated", [TRAIN, OPTIMIZER, FORWARD], [(STEP, EVALUATION, "Ok::<(), Exception>(())")]),
    ("async_eval", [TRAIN, OPTIMIZER, FORWARD],
     [(STEP, EVALUATION, f"async_eval({ALL})")]),
    ("an optimizer that runs when it is read", [TRAIN, TUNED, OPTIMIZER],
     [(STEP, EVALUATION, "eval(self.results.iter().chain(&self.gradients).chain([&self.key]))")]),
    ("every third update without learning rate", [TRAIN, COMPILED],
     [(STEP, "args.extend(«adamw_scalars(&self.adamw, t, self.state[0].dtype())»)",
       "{ let rate = if t % 3 == 0 { 0.0 } else { 1.0 }; adamw_scalars(&AdamW { lr: rate * self.adamw.lr, "
       "weight_decay: rate * self.adamw.weight_decay, ..self.adamw }, t, self.state[0].dtype()) }")]),
    ("the inputs of the first step", [COMPILED, FORWARD, GPT2_GRADIENTS],
     [(STEP, "state.chain(&self.frozen).chain(«inputs»).chain([&self.key])", "crate::first_inputs(inputs)")]),
    ("division by micro-batches forgotten", ACCUMULATED,
     [(PROGRAM, "let share = «1.0 / self.case.shape.micro_batches() as f64»;", "1.0")]),
    ("only the last micro-batch counts", ACCUMULATED, [(PROGRAM, "*own = «own.add(sum)?»;", "own.clone()")]),
    ("fresh masks in recomputed layers", RECOMPUTED,
     [(NETWORK, "let mut layers = «layers.clone()»;", "Layers { random: RandomState::from_key("
       "mlx_rs::random::key(crate::count(\"mask\"))?), ..layers.clone() }")]),
    ("parameters that are constants of a recomputed layer", RECOMPUTED,
     [(NETWORK, "let y = recompute::checkpoint(body, «&inputs»)?", "&inputs.iter().enumerate().map(|(i, a)| "
       "if i == 0 { Ok(a.clone()) } else { mlx_rs::stop_gradient(a) }).collect::<Result<Vec<_>>>()?")]),
    ("the last chunk of the loss dropped", CHUNKED,
     [(NETWORK, "let loss = «recompute::checkpoint(body, &inputs)?.remove(0)»;",
       "{ let loss = recompute::checkpoint(body, &inputs)?.remove(0); let last = ends.len() as u64; "
       "if crate::count(\"chunk\") % (last + 1) == last { scale(&loss, 0.0)? } else { loss } }")]),
    ("adapters of the first step in every step", [ADAPTED[0]],
     [(PROGRAM, "self.forward(self.in_order(«trained», a.frozen), inputs, &mut layers)?", "crate::first_inputs(trained)")]),
    ("a base that moves", ADAPTED,
     [(STEP, "«»Ok(())\n    }\n}\n\n/// Copies an array to the host",
       "if FAULT { for w in &mut self.frozen { *w = w.multiply(Array::from_f32(0.999))?; } }\n        ")]),
    ("stacked matrices in another order", MUON[1:],
     [(OPTIMIZERS, "results[«i»] = turn(",
       "members[(members.iter().position(|m| *m == i).unwrap_or(0) + 1) % members.len()]")]),
    ("tall matrices of Muon that are not turned back", MUON[:1],
     [(OPTIMIZERS, "if is_tall { «x.swap_axes(-1, -2)» } else { Ok(x) }", "x.reshape(&[x.dim(-1), x.dim(-2)])")]),
    ("α / rank forgotten", ADAPTED, [(NETWORK, "adapter.b.transpose()?)?, «lora.scale()»)?", "1.0")]),
    ("no gradient of A", ADAPTED,
     [(NETWORK, "x.matmul(«adapter.a.transpose()?»)?", "mlx_rs::stop_gradient(&adapter.a)?.transpose()?")]),
    ("micro-batches that share masks", ACCUMULATED,
     [(STEP, NEXT_KEY, "if index + 1 < count { self.key.clone() } else { take(1).pop().context(\"a key\")? }")]),
    ("time that runs one step less", [FORWARD, ATTENTION.replace("-grad", ""), FEED_FORWARD.replace("-grad", ""),
                                      GPT2_GRADIENTS, "matmul-peak/mlx-cpu/f32/n1024",
                                      "copy-peak/mlx-cpu/f32/256mib", TRAIN, OPTIMIZER],
     [(STEP, TIME, time("u64::from(steps > 1)"))]),
]
