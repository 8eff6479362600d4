// RUN: not furiosa-llm opt %s --split-input-file 2>&1 | filecheck %s

// xDSL's own verifier lets a use before the definition pass.
func.func @order(%x: tensor<2xf32>) {
  %y = nn.neg %z : tensor<2xf32> loc("mlp"("neg_1"))
  %z = nn.silu %x : tensor<2xf32> loc("mlp"("silu_1"))
  func.return
}
// CHECK:      error[IRV002]: operand 0 is not defined at its use
// CHECK-NEXT:   at: nn.neg in @order, mlp (neg_1)
// CHECK-NEXT:   cause: it is defined by nn.silu in @order, mlp (silu_1)

// -----

// A symbol that nothing declares.
nn.parameter @lm_head.weight : tensor<2xf32>
func.func @missing() {
  %w = nn.get_parameter @lm_head.bias : tensor<2xf32>
  func.return
}
// CHECK:      error[IRV004]: @lm_head.bias is not a declared parameter
// CHECK:        cause: the module declares as parameter: @lm_head.weight

// -----

// A parameter has the type of its declaration.
nn.parameter @lm_head.weight : tensor<2xf32>
func.func @differs() {
  %w = nn.get_parameter @lm_head.weight : tensor<3xf32>
  func.return
}
// CHECK:      error[IRV005]
// CHECK:        cause: used as tensor<3xf32>, declared as tensor<2xf32>

// -----

// A call passes what the function takes.
func.func private @callee(tensor<2xf32>) -> ()
func.func @caller(%x: tensor<3xf32>) {
  func.call @callee(%x) : (tensor<3xf32>) -> ()
  func.return
}
// CHECK:      error[IRV005]
// CHECK:        cause: used as (tensor<3xf32>) -> (), declared as (tensor<2xf32>) -> ()

// -----

// A program is a finite tree of calls.
func.func @again() {
  func.call @again() : () -> ()
  func.return
}
// CHECK:      error[IRV006]
// CHECK:        cause: @again -> @again

// -----

// Nothing says how large "batch" is.
func.func @unbound(%x: tensor<1xf32>) {
  %y = nn.expand %x : tensor<1xf32> -> tensor<?xf32, #nn.dims<"batch">>
  func.return
}
// CHECK:      error[IRV007]: the size of dimension "batch" is unknown

// -----

// Text that is no IR: the place is line and column.
func.func @syntax() {
  %0 = nn.nosuch
  func.return
}
// CHECK:      error[IRV008]: cannot parse the IR
// CHECK:        cause: Operation nn.nosuch is not registered
