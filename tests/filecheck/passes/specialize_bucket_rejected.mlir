// RUN: not furiosa-llm opt %s --passes "specialize-bucket{kind=decode batch=4 length=256}" 2>&1 | filecheck %s

// Without a cache, a step of one token would attend to that token alone.
%q = "test.op"() : () -> tensor<2x1x3x4xf32>
%0 = nn.attention %q, %q, %q scale 0.5 causal : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32> loc("layers.0.attn")
// CHECK:      error[PAS009]: a decode bucket needs KV caches
// CHECK-NEXT:   at: nn.attention, layers.0.attn
// CHECK:        next: run paged-attention before specialize-bucket
