// RUN: not furiosa-llm opt %s --passes prune-logits --split-input-file 2>&1 | filecheck %s

// Which token is the last is not known before paged-attention.
func.func @forward(%input_ids: tensor<2x3xi32>, %position_ids: tensor<2x3xi32>) -> tensor<2x3x9xf32> {
  %0 = "test.op"() : () -> tensor<2x3x9xf32>
  func.return %0 : tensor<2x3x9xf32>
}
// CHECK:      error[PAS007]: @forward has no input `lengths`
// CHECK:        next: run paged-attention first

// -----

builtin.module {
}
// CHECK:      error[PAS004]: the module has no function @forward
// CHECK:        cause: the module has no function
