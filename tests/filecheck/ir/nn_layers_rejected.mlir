// RUN: not furiosa-llm opt %s --split-input-file 2>&1 | filecheck %s

// The error names K on both sides, and the layer.
func.func @linear(%x: tensor<2x64xbf16>, %w: tensor<96x65xbf16>) {
  %0 = nn.linear %x, %w : tensor<2x64xbf16>, tensor<96x65xbf16> -> tensor<2x96xbf16> loc("mlp.up_proj"("linear_4"))
  func.return
}
// CHECK:      at: nn.linear in @linear, mlp.up_proj (linear_4)
// CHECK-NEXT: cause: x has K = 64 but w has K = 65

// -----

// KV heads serve equally many query heads each.
func.func @groups(%q: tensor<1x4x2x16xbf16>, %k: tensor<1x3x2x16xbf16>) {
  %0 = nn.attention %q, %k, %k scale 0.25 causal : tensor<1x4x2x16xbf16>, tensor<1x3x2x16xbf16>, tensor<1x3x2x16xbf16> -> tensor<1x2x4x16xbf16>
  func.return
}
// CHECK: cause: Q = 4 is not a multiple of G = 3

// -----

// What grows with the model is a parameter.
func.func @big() {
  %0 = nn.constant dense<0.0> : tensor<256x256xf32>
  func.return
}
// CHECK: cause: value has 262144 bytes, more than 65536: use nn.parameter
