// RUN: furiosa-llm opt %s | filecheck %s

// Write the new keys and values, then attend to everything that the block table names.
func.func @attend(%q: tensor<?x4x?x16xbf16, #nn.dims<"batch", _, "seq", _>>, %k: tensor<?x2x?x16xbf16, #nn.dims<"batch", _, "seq", _>>, %cache: tensor<?x2x2x16xbf16, #nn.dims<"slots", _, _, _>>, %tokens: tensor<?x?xi32, #nn.dims<"batch", "seq">>, %table: tensor<?x?xi32, #nn.dims<"batch", "attn">>, %lengths: tensor<?xi32, #nn.dims<"batch">>) {
  %c = paged.write %cache, %k, %k, %tokens : tensor<?x2x2x16xbf16, #nn.dims<"slots", _, _, _>>, tensor<?x2x?x16xbf16, #nn.dims<"batch", _, "seq", _>>, tensor<?x2x?x16xbf16, #nn.dims<"batch", _, "seq", _>>, tensor<?x?xi32, #nn.dims<"batch", "seq">> -> tensor<?x2x2x16xbf16, #nn.dims<"slots", _, _, _>>
  %y = paged.attention %q, %c, %table, %lengths, %tokens scale 0.25 window 8 : tensor<?x4x?x16xbf16, #nn.dims<"batch", _, "seq", _>>, tensor<?x2x2x16xbf16, #nn.dims<"slots", _, _, _>>, tensor<?x?xi32, #nn.dims<"batch", "attn">>, tensor<?xi32, #nn.dims<"batch">>, tensor<?x?xi32, #nn.dims<"batch", "seq">> -> tensor<?x?x4x16xbf16, #nn.dims<"batch", "seq", _, _>>
  %flat = nn.reshape %y : tensor<?x?x4x16xbf16, #nn.dims<"batch", "seq", _, _>> -> tensor<?x?x64xbf16, #nn.dims<"batch", "seq", _>>
  %last = paged.last_token %flat, %lengths : tensor<?x?x64xbf16, #nn.dims<"batch", "seq", _>>, tensor<?xi32, #nn.dims<"batch">> -> tensor<?x1x64xbf16, #nn.dims<"batch", _, _>>
  func.return
}
// CHECK:      %c = paged.write %cache, %k, %k, %tokens : {{.*}} -> tensor<?x2x2x16xbf16, #nn.dims<"slots", _, _, _>>
// CHECK-NEXT: %y = paged.attention %q, %c, %table, %lengths, %tokens scale 0.25 window 8 : {{.*}} -> tensor<?x?x4x16xbf16, #nn.dims<"batch", "seq", _, _>>
// CHECK:      %last = paged.last_token %flat, %lengths : {{.*}} -> tensor<?x1x64xbf16, #nn.dims<"batch", _, _>>
