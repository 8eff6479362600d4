// RUN: furiosa-llm opt %s --passes "specialize-bucket{kind=decode batch=4 length=256}" --split-input-file | filecheck %s
// RUN: furiosa-llm opt %s --passes "specialize-bucket{kind=prefill batch=1 length=128}" --split-input-file | filecheck %s --check-prefix PREFILL

// Names become sizes in arguments, results, calls and function types; slots stay a name, and so
// do names of other dims. The last of one token is that token.
func.func @forward(%x: tensor<?x?x8xf32, #nn.dims<"batch", "seq", _>>, %table: tensor<?x?xi32, #nn.dims<"batch", "attn">>, %lengths: tensor<?xi32, #nn.dims<"batch">>, %cache: tensor<?x1x2x8xf32, #nn.dims<"slots", _, _, _>>) -> tensor<?x1x8xf32, #nn.dims<"batch", _, _>> {
  %0 = nn.reshape %x : tensor<?x?x8xf32, #nn.dims<"batch", "seq", _>> -> tensor<?x?x2x4xf32, #nn.dims<"batch", "seq", _, _>> loc("split")
  %1 = func.call @inner(%x, %lengths) : (tensor<?x?x8xf32, #nn.dims<"batch", "seq", _>>, tensor<?xi32, #nn.dims<"batch">>) -> tensor<?x1x8xf32, #nn.dims<"batch", _, _>>
  func.return %1 : tensor<?x1x8xf32, #nn.dims<"batch", _, _>>
}
func.func private @inner(%x: tensor<?x?x8xf32, #nn.dims<"batch", "seq", _>>, %lengths: tensor<?xi32, #nn.dims<"batch">>) -> tensor<?x1x8xf32, #nn.dims<"batch", _, _>> {
  %0 = paged.last_token %x, %lengths : tensor<?x?x8xf32, #nn.dims<"batch", "seq", _>>, tensor<?xi32, #nn.dims<"batch">> -> tensor<?x1x8xf32, #nn.dims<"batch", _, _>>
  func.return %0 : tensor<?x1x8xf32, #nn.dims<"batch", _, _>>
}
func.func private @other(%x: tensor<?x?xf32, #nn.dims<"batch", "experts">>) {
  func.return
}
// CHECK:      func.func @forward(%x: tensor<4x1x8xf32> {{.*}}, %table: tensor<4x256xi32> {{.*}}, %lengths: tensor<4xi32> {{.*}}, %cache: tensor<?x1x2x8xf32, #nn.dims<"slots", _, _, _>> {{.*}}) -> tensor<4x1x8xf32>
// CHECK-NEXT:   nn.reshape %x : tensor<4x1x8xf32> -> tensor<4x1x2x4xf32> loc("split")
// CHECK-NEXT:   func.call @inner(%x, %lengths) : (tensor<4x1x8xf32>, tensor<4xi32>) -> tensor<4x1x8xf32>
// CHECK:      func.func private @inner(%x: tensor<4x1x8xf32> {{.*}}, %lengths: tensor<4xi32> {{.*}}) -> tensor<4x1x8xf32>
// CHECK-NEXT:   func.return %x
// CHECK:      func.func private @other(%x: tensor<4x?xf32, #nn.dims<_, "experts">>

// PREFILL:      func.func @forward(%x: tensor<1x128x8xf32> {{.*}}, %table: tensor<1x128xi32>
// PREFILL:      func.func private @inner(
// PREFILL-NEXT:   paged.last_token %x, %lengths : tensor<1x128x8xf32>, tensor<1xi32> -> tensor<1x1x8xf32>

// -----

// A window hides nothing if it is as long as the bucket.
%q, %c, %t, %n, %p = "test.op"() : () -> (tensor<2x1x1x8xf32>, tensor<5x1x2x8xf32>, tensor<2x9xi32>, tensor<2xi32>, tensor<2x1xi32>)
%0 = paged.attention %q, %c, %t, %n, %p scale 1.0 window 255 : tensor<2x1x1x8xf32>, tensor<5x1x2x8xf32>, tensor<2x9xi32>, tensor<2xi32>, tensor<2x1xi32> -> tensor<2x1x1x8xf32>
%1 = paged.attention %q, %c, %t, %n, %p scale 1.0 window 256 : tensor<2x1x1x8xf32>, tensor<5x1x2x8xf32>, tensor<2x9xi32>, tensor<2xi32>, tensor<2x1xi32> -> tensor<2x1x1x8xf32>
// CHECK:      "test.op"
// CHECK-NEXT: paged.attention %q, %c, %t, %n, %p scale 1.0 window 255 :
// CHECK-NEXT: paged.attention %q, %c, %t, %n, %p scale 1.0 :
