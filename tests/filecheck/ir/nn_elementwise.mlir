// RUN: furiosa-llm opt %s --split-input-file | filecheck %s

// Ops of one tensor write its type once.
func.func @unary(%x: tensor<?x8xbf16, #nn.dims<"batch", _>>) {
  %0 = nn.neg %x : tensor<?x8xbf16, #nn.dims<"batch", _>>
  %1 = nn.silu %x : tensor<?x8xbf16, #nn.dims<"batch", _>>
  %2 = nn.gelu %x approximate "tanh" : tensor<?x8xbf16, #nn.dims<"batch", _>>
  func.return
}
// CHECK:      @unary(%x: tensor<?x8xbf16, #nn.dims<"batch", _>>
// CHECK-NEXT: nn.neg %x : tensor<?x8xbf16, #nn.dims<"batch", _>>
// CHECK-NEXT: nn.silu %x : tensor<?x8xbf16, #nn.dims<"batch", _>>
// CHECK-NEXT: nn.gelu %x approximate "tanh" : tensor<?x8xbf16, #nn.dims<"batch", _>>

// -----

// Scalars print with as few digits as read back exactly, whole numbers with a point.
func.func @scalars(%x: tensor<8xf32>) {
  %0 = nn.scale %x by 0.1 : tensor<8xf32>
  %1 = nn.scale %x by 0.10000000000000001 : tensor<8xf32>
  %2 = nn.offset %x by 1.0e-05 : tensor<8xf32>
  %3 = nn.offset %x by 1234567 : tensor<8xf32>
  %4 = nn.pow %x to -0.0 : tensor<8xf32>
  func.return
}
// CHECK:      nn.scale %x by 0.1 : tensor<8xf32>
// CHECK-NEXT: nn.scale %x by 0.1 : tensor<8xf32>
// CHECK-NEXT: nn.offset %x by 1.0e-05 : tensor<8xf32>
// CHECK-NEXT: nn.offset %x by 1234567.0 : tensor<8xf32>
// CHECK-NEXT: nn.pow %x to -0.0 : tensor<8xf32>

// -----

// Broadcasting as in PyTorch: aligned at the right, 1 stretches, a name equals itself.
func.func @broadcast(%a: tensor<?x1x8xf32, #nn.dims<"batch", _, _>>, %b: tensor<?x1xf32, #nn.dims<"seq", _>>) {
  %0 = nn.add %a, %b : tensor<?x1x8xf32, #nn.dims<"batch", _, _>>, tensor<?x1xf32, #nn.dims<"seq", _>> -> tensor<?x?x8xf32, #nn.dims<"batch", "seq", _>>
  %1 = nn.cast %0 : tensor<?x?x8xf32, #nn.dims<"batch", "seq", _>> -> tensor<?x?x8xbf16, #nn.dims<"batch", "seq", _>>
  func.return
}
// CHECK: [[SUM:%.*]] = nn.add %a, %b : {{.*}} -> tensor<?x?x8xf32, #nn.dims<"batch", "seq", _>>
// CHECK-NEXT: nn.cast [[SUM]] : {{.*}} -> tensor<?x?x8xbf16, #nn.dims<"batch", "seq", _>>
