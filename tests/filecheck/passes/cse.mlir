// RUN: furiosa-llm opt %s --passes cse --split-input-file | filecheck %s

// Equal expressions are computed once, also if they are equal only through their operands.
%x = "test.op"() : () -> tensor<4xf32>
%0 = nn.neg %x : tensor<4xf32>
%1 = nn.neg %x : tensor<4xf32>
%2 = nn.exp %0 : tensor<4xf32>
%3 = nn.exp %1 : tensor<4xf32>
"test.op"(%2, %3) : (tensor<4xf32>, tensor<4xf32>) -> ()
// CHECK:      [[NEG:%.*]] = nn.neg %x
// CHECK-NEXT: [[EXP:%.*]] = nn.exp [[NEG]]
// CHECK-NEXT: "test.op"([[EXP]], [[EXP]])

// -----

// Other attributes, other result types: other expressions. -0.0 is not 0.0: x + -0.0 keeps the
// sign of a zero.
%x = "test.op"() : () -> tensor<4xf32>
%0 = nn.scale %x by 2.0 : tensor<4xf32>
%1 = nn.scale %x by 3.0 : tensor<4xf32>
%2 = nn.offset %x by 0.0 : tensor<4xf32>
%3 = nn.offset %x by -0.0 : tensor<4xf32>
%4 = nn.cast %x : tensor<4xf32> -> tensor<4xbf16>
%5 = nn.cast %x : tensor<4xf32> -> tensor<4xf16>
// CHECK:      nn.scale %x by 2.0
// CHECK-NEXT: nn.scale %x by 3.0
// CHECK-NEXT: nn.offset %x by 0.0
// CHECK-NEXT: nn.offset %x by -0.0
// CHECK-NEXT: nn.cast {{.*}} -> tensor<4xbf16>
// CHECK-NEXT: nn.cast {{.*}} -> tensor<4xf16>

// -----

// What two modules share belongs to the innermost module that holds both, so that it does not
// count as work of the first layer.
%x = "test.op"() : () -> tensor<4xf32>
%0 = nn.neg %x : tensor<4xf32> loc("model.layers.0.mlp"("a"))
%1 = nn.neg %x : tensor<4xf32> loc("model.layers.1.mlp"("b"))
%2 = nn.exp %x : tensor<4xf32> loc("model.layers.1.mlp"("c"))
%3 = nn.exp %x : tensor<4xf32> loc("model.layers.1.mlp"("d"))
%4 = nn.cos %x : tensor<4xf32> loc("model.layers.1"("e"))
%5 = nn.cos %x : tensor<4xf32> loc("model.layers.10"("f"))
// CHECK:      nn.neg {{.*}} loc("model.layers"("a"))
// CHECK-NEXT: nn.exp {{.*}} loc("model.layers.1.mlp"("c"))
// CHECK-NEXT: nn.cos {{.*}} loc("model.layers"("e"))
// CHECK-NOT:  nn.

// -----

// Ops that may have an effect are never merged, and functions not with each other.
func.func @forward(%x: tensor<4xf32>) {
  %0 = "test.op"(%x) : (tensor<4xf32>) -> tensor<4xf32>
  %1 = "test.op"(%x) : (tensor<4xf32>) -> tensor<4xf32>
  %2 = nn.neg %x : tensor<4xf32>
  func.return
}
func.func @other(%x: tensor<4xf32>) {
  %0 = nn.neg %x : tensor<4xf32>
  func.return
}
// CHECK:       func.func @forward
// CHECK-COUNT-2: "test.op"(%x)
// CHECK-NEXT:  nn.neg
// CHECK:       func.func @other
// CHECK-NEXT:  nn.neg
