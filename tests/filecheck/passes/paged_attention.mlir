// RUN: furiosa-llm opt %s --passes paged-attention --split-input-file | filecheck %s

// Each call of a block gets a cache of its own; @block has its position ids already. The caches
// after the step are returned, in the order of the layers.
func.func @forward(%input_ids: tensor<?x?xi32, #nn.dims<"batch", "seq">>, %position_ids: tensor<?x?xi32, #nn.dims<"batch", "seq">>) -> tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>> {
  %0 = func.call @prologue(%input_ids) : (tensor<?x?xi32, #nn.dims<"batch", "seq">>) -> tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>> loc("")
  %1 = func.call @block(%0, %position_ids) : (tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>, tensor<?x?xi32, #nn.dims<"batch", "seq">>) -> tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>> loc("layers.0")
  %2 = func.call @block(%1, %position_ids) : (tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>, tensor<?x?xi32, #nn.dims<"batch", "seq">>) -> tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>> loc("layers.1")
  func.return %2 : tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>
}
func.func private @prologue(%ids: tensor<?x?xi32, #nn.dims<"batch", "seq">>) -> tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>> {
  %0 = "test.op"() : () -> tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>
  func.return %0 : tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>
}
func.func private @block(%x: tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>, %pos: tensor<?x?xi32, #nn.dims<"batch", "seq">>) -> tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>> {
  %k = nn.rope %x, %pos scaling 1.0 inv_freq [1.0] : tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>, tensor<?x?xi32, #nn.dims<"batch", "seq">> -> tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>
  %0 = nn.attention %x, %k, %x scale 0.5 causal window 7 : tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>, tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>, tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>> -> tensor<?x?x1x4xbf16, #nn.dims<"batch", "seq", _, _>> loc("attn"("a"))
  %1 = nn.transpose %0 dims 1, 2 : tensor<?x?x1x4xbf16, #nn.dims<"batch", "seq", _, _>> -> tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>
  func.return %1 : tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>
}
// CHECK:      func.func @forward(%input_ids: {{.*}}, %position_ids: {{.*}}, %slot_mapping: tensor<?x?xi32, #nn.dims<"batch", "seq">> {{.*}}, %block_table: tensor<?x?xi32, #nn.dims<"batch", "attn">> {{.*}}, %lengths: tensor<?xi32, #nn.dims<"batch">> {{.*}}, %cache: tensor<?x1x2x4xbf16, #nn.dims<"slots", _, _, _>> {{.*}}, %cache_1: tensor<?x1x2x4xbf16, {{.*}})
// CHECK-NEXT:   [[X:%.*]] = func.call @prologue(%input_ids)
// CHECK-NEXT:   [[X0:%.*]], [[C0:%.*]] = func.call @block([[X]], %position_ids, %slot_mapping, %block_table, %lengths, %cache) : {{.*}} loc("layers.0")
// CHECK-NEXT:   [[X1:%.*]], [[C1:%.*]] = func.call @block([[X0]], %position_ids, %slot_mapping, %block_table, %lengths, %cache_1) : {{.*}} loc("layers.1")
// CHECK-NEXT:   func.return [[X1]], [[C0]], [[C1]]
// CHECK:      func.func private @block(%x: {{.*}}, %pos: {{.*}}, %slot_mapping: {{.*}}, %block_table: {{.*}}, %lengths: {{.*}}, %cache: {{.*}})
// CHECK-NEXT:   %k = nn.rope
// CHECK-NEXT:   [[C:%.*]] = paged.write %cache, %k, %x, %slot_mapping : {{.*}} loc("attn"("a"))
// CHECK-NEXT:   [[A:%.*]] = paged.attention %x, [[C]], %block_table, %lengths, %pos scale 0.5 window 7 : {{.*}} loc("attn"("a"))
// CHECK-NEXT:   [[Y:%.*]] = nn.transpose [[A]]
// CHECK-NEXT:   func.return [[Y]], [[C]]

// -----

// A block without position embeddings is given the position ids; attention in @forward itself
// works as well.
func.func @forward(%input_ids: tensor<2x3xi32>, %position_ids: tensor<2x3xi32>) -> tensor<2x3x1x4xf32> {
  %q = "test.op"() : () -> tensor<2x1x3x4xf32>
  %0 = nn.attention %q, %q, %q scale 0.5 causal layer 0 : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32>
  %1 = func.call @block(%0) : (tensor<2x3x1x4xf32>) -> tensor<2x3x1x4xf32>
  func.return %1 : tensor<2x3x1x4xf32>
}
func.func private @block(%x: tensor<2x3x1x4xf32>) -> tensor<2x3x1x4xf32> {
  %q = nn.transpose %x dims 1, 2 : tensor<2x3x1x4xf32> -> tensor<2x1x3x4xf32>
  %0 = nn.attention %q, %q, %q scale 0.5 causal : tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32>, tensor<2x1x3x4xf32> -> tensor<2x3x1x4xf32>
  func.return %0 : tensor<2x3x1x4xf32>
}
// CHECK:      func.func @forward
// CHECK:        [[C0:%.*]] = paged.write %cache, %q, %q, %slot_mapping
// CHECK-NEXT:   [[X0:%.*]] = paged.attention %q, [[C0]], %block_table, %lengths, %position_ids
// CHECK-NEXT:   [[X1:%.*]], [[C1:%.*]] = func.call @block([[X0]], %position_ids, %slot_mapping, %block_table, %lengths, %cache_1)
// CHECK-NEXT:   func.return [[X1]], [[C0]], [[C1]]
// CHECK:      func.func private @block(%x: {{.*}}, %position_ids: {{.*}}, %slot_mapping: {{.*}}, %block_table: {{.*}}, %lengths: {{.*}}, %cache: {{.*}})

// -----

// Keys and values that are codes times one number each: the cache holds the codes, and nobody
// makes floats of them before the attention does.
func.func @forward(%input_ids: tensor<2x3xi32>, %position_ids: tensor<2x3xi32>) -> tensor<2x3x1x4xbf16> {
  %q = "test.op"() : () -> tensor<2x1x3x4xbf16>
  %ks, %vs = "test.op"() : () -> (tensor<1xf32>, tensor<bf16>)
  %kc = quant.quantize %q by %ks : tensor<2x1x3x4xbf16>, tensor<1xf32> -> tensor<2x1x3x4xf8E4M3FN>
  %k = quant.dequantize %kc by %ks : tensor<2x1x3x4xf8E4M3FN>, tensor<1xf32> -> tensor<2x1x3x4xbf16>
  %vc = quant.quantize %q by %vs : tensor<2x1x3x4xbf16>, tensor<bf16> -> tensor<2x1x3x4xf8E4M3FN>
  %v = quant.dequantize %vc by %vs : tensor<2x1x3x4xf8E4M3FN>, tensor<bf16> -> tensor<2x1x3x4xbf16>
  %0 = nn.attention %q, %k, %v scale 0.5 causal : tensor<2x1x3x4xbf16>, tensor<2x1x3x4xbf16>, tensor<2x1x3x4xbf16> -> tensor<2x3x1x4xbf16>
  func.return %0 : tensor<2x3x1x4xbf16>
}
// CHECK:      func.func @forward({{.*}} %cache: tensor<?x1x2x4xf8E4M3FN, #nn.dims<"slots", _, _, _>>{{.*}})
// CHECK:        %kc = quant.quantize %q by %ks
// CHECK-NEXT:   %vc = quant.quantize %q by %vs
// CHECK-NEXT:   [[C0:%.*]] = paged.write %cache, %kc, %vc, %slot_mapping
// CHECK-NEXT:   [[X0:%.*]] = paged.attention %q, [[C0]], %block_table, %lengths, %position_ids k_scale %ks v_scale %vs scale 0.5
// CHECK-NEXT:   func.return [[X0]], [[C0]]

// -----

// Only the keys are codes, or each token has its own scale: attention gets what they stand for.
func.func @forward(%input_ids: tensor<2x3xi32>, %position_ids: tensor<2x3xi32>) -> tensor<2x3x1x4xbf16> {
  %q = "test.op"() : () -> tensor<2x1x3x4xbf16>
  %s, %ts = "test.op"() : () -> (tensor<1xf32>, tensor<2x1x3x1xf32>)
  %c = quant.quantize %q by %s : tensor<2x1x3x4xbf16>, tensor<1xf32> -> tensor<2x1x3x4xf8E4M3FN>
  %k = quant.dequantize %c by %s : tensor<2x1x3x4xf8E4M3FN>, tensor<1xf32> -> tensor<2x1x3x4xbf16>
  %0 = nn.attention %q, %k, %q scale 0.5 causal : tensor<2x1x3x4xbf16>, tensor<2x1x3x4xbf16>, tensor<2x1x3x4xbf16> -> tensor<2x3x1x4xbf16>
  %v = quant.dequantize %c by %ts : tensor<2x1x3x4xf8E4M3FN>, tensor<2x1x3x1xf32> -> tensor<2x1x3x4xbf16>
  %1 = nn.attention %q, %k, %v scale 0.5 causal : tensor<2x1x3x4xbf16>, tensor<2x1x3x4xbf16>, tensor<2x1x3x4xbf16> -> tensor<2x3x1x4xbf16>
  %y = nn.add %0, %1 : tensor<2x3x1x4xbf16>, tensor<2x3x1x4xbf16> -> tensor<2x3x1x4xbf16>
  func.return %y : tensor<2x3x1x4xbf16>
}
// CHECK:      func.func @forward({{.*}} %cache: tensor<?x1x2x4xbf16, {{.*}} %cache_1: tensor<?x1x2x4xbf16,
// CHECK:        %k = quant.dequantize %c by %s
// CHECK-NEXT:   paged.write %cache, %k, %q, %slot_mapping
// CHECK:        %v = quant.dequantize %c by %ts
// CHECK-NEXT:   paged.write %cache_1, %k, %v, %slot_mapping
