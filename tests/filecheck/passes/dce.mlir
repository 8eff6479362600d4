// RUN: furiosa-llm opt %s --passes dce --split-input-file | filecheck %s

// What no output depends on goes, users first, so that a chain goes at once.
%x = "test.op"() : () -> tensor<4xf32>
%0 = nn.neg %x : tensor<4xf32>
%1 = nn.exp %x : tensor<4xf32>
%2 = nn.sqrt %1 : tensor<4xf32>
"test.op"(%0) : (tensor<4xf32>) -> ()
// CHECK:      %x = "test.op"()
// CHECK-NEXT: [[KEPT:%.*]] = nn.neg %x
// CHECK-NEXT: "test.op"([[KEPT]])

// -----

// A parameter that nothing reads, and a private function that nothing calls, with what only it
// needs. Functions without `private` may be called from outside.
nn.parameter @unread : tensor<4xf32>
nn.parameter @read : tensor<4xf32>
nn.parameter @read_in_dead_code : tensor<4xf32>
func.func @forward() -> tensor<4xf32> {
  %0 = nn.get_parameter @read : tensor<4xf32>
  %1 = nn.get_parameter @unread : tensor<4xf32>
  func.return %0 : tensor<4xf32>
}
func.func private @dead() -> tensor<4xf32> {
  %0 = nn.get_parameter @read_in_dead_code : tensor<4xf32>
  func.return %0 : tensor<4xf32>
}
func.func @public() {
  func.return
}
// CHECK:       builtin.module
// CHECK-NEXT:  nn.parameter @read :
// CHECK-NEXT:  func.func @forward
// CHECK-NEXT:    nn.get_parameter @read :
// CHECK-NEXT:    func.return
// CHECK-NEXT:  }
// CHECK-NEXT:  func.func @public

// -----

// A call whose results are unused goes if the callee only computes; arguments stay.
func.func @forward(%x: tensor<4xf32>, %unused: tensor<4xf32>) {
  %0 = func.call @pure(%x) : (tensor<4xf32>) -> tensor<4xf32>
  %1 = func.call @effect(%x) : (tensor<4xf32>) -> tensor<4xf32>
  func.return
}
func.func private @pure(%x: tensor<4xf32>) -> tensor<4xf32> {
  %0 = nn.neg %x : tensor<4xf32>
  func.return %0 : tensor<4xf32>
}
func.func private @effect(%x: tensor<4xf32>) -> tensor<4xf32> {
  %0 = "test.op"(%x) : (tensor<4xf32>) -> tensor<4xf32>
  func.return %0 : tensor<4xf32>
}
// CHECK:       builtin.module
// CHECK-NEXT:  func.func @forward(%x: {{.*}}, %unused: {{.*}}) {
// CHECK-NEXT:    func.call @effect
// CHECK-NEXT:    func.return
// CHECK-NEXT:  }
// CHECK-NEXT:  func.func private @effect
