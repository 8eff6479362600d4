// RUN: not furiosa-llm opt %s --split-input-file 2>&1 | filecheck %s

// The sizes behind two names are unknown, so both must stay.
func.func @lost_name(%x: tensor<?x?x4xf32, #nn.dims<"batch", "seq", _>>) {
  %0 = nn.reshape %x : tensor<?x?x4xf32, #nn.dims<"batch", "seq", _>> -> tensor<?x4xf32, #nn.dims<"batch", _>>
  func.return
}
// CHECK: at: nn.reshape in @lost_name
// CHECK-NEXT: cause: [batch, seq, 4] and [batch, 4] do not hold the same number of elements

// -----

// Whether 1 to 2 lies inside a dynamic dimension cannot be known.
func.func @cut(%x: tensor<?xf32, #nn.dims<"seq">>) {
  %0 = nn.slice %x dim 0 from 1 to 2 : tensor<?xf32, #nn.dims<"seq">> -> tensor<1xf32>
  func.return
}
// CHECK: cause: dimension 0 of x, seq, is dynamic: it cannot be cut
