// RUN: not furiosa-llm opt %s --passes outline-blocks --split-input-file 2>&1 | filecheck %s

// Layer 0 needs what layer 1 computes: they cannot be functions that run one after the other.
func.func @forward(%q: tensor<2x1x3x4xf32>) -> tensor<2x3x1x4xf32> {
  %0 = nn.neg %q : tensor<2x1x3x4xf32> loc("h.0")
  %1 = nn.attention %0, %0, %0 scale 0.5 causal : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32> loc("h.1.attn")
  %2 = nn.transpose %1 dims 1, 2 : tensor<2x3x1x4xf32> -> tensor<2x1x3x4xf32> loc("h.1")
  %3 = nn.attention %2, %2, %2 scale 0.5 causal : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32> loc("h.0.attn")
  func.return %3 : tensor<2x3x1x4xf32>
}
// CHECK:      error[PAS005]: the decoder blocks cannot run one after the other
// CHECK-NEXT:   at: nn.attention in @forward, h.0.attn
// CHECK-NEXT:   cause: block h.0 needs a value of block h.1, which begins later

// -----

func.func @main(%x: tensor<4xf32>) {
  func.return
}
// CHECK:      error[PAS004]: the module has no function @forward
// CHECK-NEXT:   at: pass outline-blocks
// CHECK-NEXT:   cause: the module has @main
