"""The TensorDict keys of states and rollouts, written once.

A state has batch shape ``[B]``, a rollout ``[B, T]`` with ``T = K`` stochastic denoising steps.
``*S`` is the shape of a latent, ``*D`` the shape of a clean sample; both are float32.

| key                  | shape        | dtype   | unit | meaning                                 |
|----------------------|--------------|---------|------|-----------------------------------------|
| `x`                  | [B, T, *S]   | float32 |      | latent x_k before the action            |
| `step`               | [B, T]       | int64   | step | k = 0 .. K-1, counts denoising steps    |
| `(control, name)`    | [B, T]       | int64   |      | label of a control; last index = null   |
| `(control, prompt)`  | [B, T]       | int64   |      | index of a prior's prompt; last = none  |
| `action`             | [B, T, *S]   | float32 |      | next latent x_{k+1}                     |
| `loc`                | [B, T, *S]   | float32 |      | mean of the policy's Gaussian           |
| `scale`              | [B, T]       | float32 |      | its standard deviation, per dimension   |
| `action_log_prob`    | [B, T]       | float32 | nats | log pi(a|s), summed over dimensions     |
| `prior_loc`          | [B, T, *S]   | float32 |      | mean of the prior's Gaussian            |
| `prior_log_prob`     | [B, T]       | float32 | nats | log p_ref(a|s), summed over dimensions  |
| `kl`                 | [B, T]       | float32 | nats | closed-form KL(pi || p_ref) of the step |
| `log_ratio`          | [B, T]       | float32 | nats | log pi(a|s) - log p_ref(a|s)            |
| `(next, reward)`     | [B, T, 1]    | float32 | nats | 0 before the last step                  |
| `(next, done)`       | [B, T, 1]    | bool    |      | true at the last step                   |
| `behaviour_loc`      | [B, T, *S]   | float32 |      | loc of the policy that acted, a constant |
| `clean`              | [B, T, *S]   | float32 |      | clean latent, a view repeated along T   |
| `sample`             | [B, T, *D]   | float32 |      | decoded sample, repeated likewise       |

A control that is a number has float32 values; NaN asks for nothing. `(next, x)` is not stored: it
is `action`. Batches cut from a rollout lack `clean` and `sample`; `prepare` has them.
"""

X = "x"
STEP = "step"
CONTROL = "control"
PROMPT = "prompt"
ACTION = "action"
LOC = "loc"
SCALE = "scale"
ACTION_LOG_PROB = "action_log_prob"
PRIOR_LOC = "prior_loc"
PRIOR_LOG_PROB = "prior_log_prob"
KL = "kl"
LOG_RATIO = "log_ratio"
BEHAVIOUR_LOC = "behaviour_loc"
REWARD = "reward"
NEXT_REWARD = ("next", "reward")
NEXT_DONE = ("next", "done")
CLEAN = "clean"
SAMPLE = "sample"
