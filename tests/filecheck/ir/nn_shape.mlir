// RUN: furiosa-llm opt %s | filecheck %s

// Heads apart, heads before tokens, halves of a head: what attention does to a projection.
func.func @shape(%x: tensor<?x?x64xbf16, #nn.dims<"batch", "seq", _>>) {
  %heads = nn.reshape %x : tensor<?x?x64xbf16, #nn.dims<"batch", "seq", _>> -> tensor<?x?x4x16xbf16, #nn.dims<"batch", "seq", _, _>>
  %q = nn.transpose %heads dims 1, 2 : tensor<?x?x4x16xbf16, #nn.dims<"batch", "seq", _, _>> -> tensor<?x4x?x16xbf16, #nn.dims<"batch", _, "seq", _>>
  %low = nn.slice %q dim 3 from 0 to 8 : tensor<?x4x?x16xbf16, #nn.dims<"batch", _, "seq", _>> -> tensor<?x4x?x8xbf16, #nn.dims<"batch", _, "seq", _>>
  %both = nn.concat %low, %low dim 3 : tensor<?x4x?x8xbf16, #nn.dims<"batch", _, "seq", _>>, tensor<?x4x?x8xbf16, #nn.dims<"batch", _, "seq", _>> -> tensor<?x4x?x16xbf16, #nn.dims<"batch", _, "seq", _>>
  %mean = nn.mean %both dims [3] keepdim : tensor<?x4x?x16xbf16, #nn.dims<"batch", _, "seq", _>> -> tensor<?x4x?x1xbf16, #nn.dims<"batch", _, "seq", _>>
  %flat = nn.mean %both dims [1, 3] : tensor<?x4x?x16xbf16, #nn.dims<"batch", _, "seq", _>> -> tensor<?x?xbf16, #nn.dims<"batch", "seq">>
  %wide = nn.expand %mean : tensor<?x4x?x1xbf16, #nn.dims<"batch", _, "seq", _>> -> tensor<?x4x?x16xbf16, #nn.dims<"batch", _, "seq", _>>
  func.return
}
// CHECK:      %heads = nn.reshape %x : {{.*}} -> tensor<?x?x4x16xbf16, #nn.dims<"batch", "seq", _, _>>
// CHECK-NEXT: %q = nn.transpose %heads dims 1, 2 : {{.*}} -> tensor<?x4x?x16xbf16, #nn.dims<"batch", _, "seq", _>>
// CHECK-NEXT: %low = nn.slice %q dim 3 from 0 to 8 : {{.*}} -> tensor<?x4x?x8xbf16, #nn.dims<"batch", _, "seq", _>>
// CHECK-NEXT: %both = nn.concat %low, %low dim 3 : {{.*}} -> tensor<?x4x?x16xbf16, #nn.dims<"batch", _, "seq", _>>
// CHECK-NEXT: %mean = nn.mean %both dims [3] keepdim : {{.*}} -> tensor<?x4x?x1xbf16, #nn.dims<"batch", _, "seq", _>>
// CHECK-NEXT: %flat = nn.mean %both dims [1, 3] : {{.*}} -> tensor<?x?xbf16, #nn.dims<"batch", "seq">>
// CHECK-NEXT: %wide = nn.expand %mean : {{.*}} -> tensor<?x4x?x16xbf16, #nn.dims<"batch", _, "seq", _>>
