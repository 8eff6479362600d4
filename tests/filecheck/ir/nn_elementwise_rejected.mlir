// RUN: not furiosa-llm opt %s --split-input-file 2>&1 | filecheck %s

// Type promotion is explicit: a cast must stand before the sum.
func.func @promotion(%a: tensor<2xf32>, %b: tensor<2xbf16>) {
  %0 = nn.add %a, %b : tensor<2xf32>, tensor<2xbf16> -> tensor<2xf32> loc("mlp"("add_1"))
  func.return
}
// CHECK:      error[IRV001]: the IR is not valid
// CHECK-NEXT:   at: nn.add in @promotion, mlp (add_1)
// CHECK-NEXT:   cause: a is f32 but b is bf16: cast one of them

// -----

// A dynamic dimension without a name could not be matched with any other.
func.func @unnamed(%x: tensor<?xf32>) {
  %0 = nn.neg %x : tensor<?xf32>
  func.return
}
// CHECK:      error[IRV008]: cannot parse the IR
// CHECK:      cause: dynamic dimension 0 of tensor<?xf32> has no name

// -----

// Two names are two sizes, even if they happen to be equal at run time.
func.func @names(%a: tensor<?xf32, #nn.dims<"batch">>, %b: tensor<?xf32, #nn.dims<"seq">>) {
  %0 = nn.mul %a, %b : tensor<?xf32, #nn.dims<"batch">>, tensor<?xf32, #nn.dims<"seq">> -> tensor<?xf32, #nn.dims<"batch">>
  func.return
}
// CHECK:      error[IRV001]
// CHECK:      cause: [batch] and [seq] do not broadcast
