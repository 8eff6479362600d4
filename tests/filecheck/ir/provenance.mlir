// RUN: furiosa-llm opt %s | filecheck %s

// Module path and source node stand on every op, also inside an outlined function, where the path
// is relative to the call's.
func.func @forward(%x: tensor<2x4xbf16> loc("model"("hidden"))) -> tensor<2x4xbf16> {
  %y = func.call @block_0(%x) : (tensor<2x4xbf16>) -> tensor<2x4xbf16> loc("model.layers.3")
  func.return %y : tensor<2x4xbf16>
}
func.func private @block_0(%x: tensor<2x4xbf16>) -> tensor<2x4xbf16> {
  %y = nn.silu %x : tensor<2x4xbf16> loc("mlp.act_fn"("silu_3"))
  func.return %y : tensor<2x4xbf16>
}
// CHECK:      func.func @forward(%x: tensor<2x4xbf16> loc("model"("hidden"))) -> tensor<2x4xbf16> {
// CHECK-NEXT:   func.call @block_0(%x) : (tensor<2x4xbf16>) -> tensor<2x4xbf16> loc("model.layers.3")
// CHECK:      func.func private @block_0
// CHECK-NEXT:   nn.silu %x : tensor<2x4xbf16> loc("mlp.act_fn"("silu_3"))
