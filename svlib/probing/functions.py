"""Names of torch's functions by what they do."""

from svlib.probing import operations as ops

RECTIFIERS = frozenset({"relu", "relu6", "threshold", "clamp", "clamp_min", "hardtanh", "clip"})
SMOOTH = frozenset({"gelu", "silu", "mish", "hardswish"})
BOUNDED = frozenset({"sigmoid", "tanh", "softmax", "hardsigmoid", "hardtanh", "erf", "softsign"})
BOUNDED |= {"lstm", "LSTM", "gru", "GRU", "rnn_tanh", "RNN", "sin", "cos"}
ODD = frozenset({"tanh", "hardtanh", "erf", "softsign", "sin"})  # small entries pass as they are
ACTIVATIONS = RECTIFIERS | SMOOTH | BOUNDED | {"leaky_relu", "elu", "selu", "celu", "softplus"}
ACTIVATIONS |= {"abs", "exp", "square", "log_softmax", "logsigmoid", "prelu", "rrelu"}
POOLS = frozenset(f"{k}_pool{d}d" for d in (1, 2, 3) for k in ("avg", "max", "lp"))
POOLS |= {f"adaptive_{k}_pool{d}d" for d in (1, 2, 3) for k in ("avg", "max")}
AVERAGES = POOLS | {"mean", "sum", "amax", "max", "logsumexp", "einsum", "matmul", "rmatmul", "bmm"}
AVERAGES |= {"mm", "index_add", "scatter_add", "scatter_reduce", "scaled_dot_product_attention"}
AVERAGES |= {"multi_head_attention_forward", "nanmean", "median"}
OPENING = (BOUNDED - ODD) | {"exp", "softplus", "log_softmax", "normalize"}
HALF_OPENING = ODD | RECTIFIERS | SMOOTH  # a gate, unless the other factor is one
MULTIPLYING = ops.PRODUCTS | ops.QUOTIENTS | {"matmul", "rmatmul", "bmm", "einsum", "baddbmm"}
ATTENTION = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})
PASSING = ops.MOVES | {"getitem", "split", "chunk", "unbind", "dropout", "neg", "masked_fill"}
