// RUN: not furiosa-llm opt %s --passes paged-attention --split-input-file 2>&1 | filecheck %s

func.func @forward(%ids: tensor<2x3xi32>, %pos: tensor<2x3xi32>) -> tensor<2x3x1x4xf32> {
  %q = "test.op"() : () -> tensor<2x1x3x4xf32>
  %0 = nn.attention %q, %q, %q scale 0.5 : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32> loc("layers.0.attn")
  func.return %0 : tensor<2x3x1x4xf32>
}
// CHECK:      error[PAS006]: attention is not causal
// CHECK-NEXT:   at: nn.attention in @forward, layers.0.attn

// -----

func.func @forward(%q: tensor<2x1x3x4xf32>) -> tensor<2x3x1x4xf32> {
  %0 = nn.attention %q, %q, %q scale 0.5 causal : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32>
  func.return %0 : tensor<2x3x1x4xf32>
}
// CHECK:      error[PAS010]: @forward has an unexpected signature
// CHECK:        cause: its arguments should be (input_ids, position_ids)
